// Drives PyTorch's CUDA caching allocator with requests from standard input (see ../requests.py), without a GPU.
//   driver TOTAL_BYTES FREE_BYTES < requests
// Prints the address of every allocation, or the message it failed with.  Two more requests record and write:
//   h N  keep a history of N events       s FILE  write a snapshot as JSON
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/PeerToPeerAccess.h>

#include <fstream>
#include <iostream>
#include <unordered_map>

namespace c10::cuda::_internal {
void setHasPrimaryContext(bool (*func)(DeviceIndex));
}
extern "C" {
extern uint64_t stub_total, stub_capacity;
extern int stub_capturing;
void stub_complete(cudaStream_t);
}

namespace allocator = c10::cuda::CUDACachingAllocator;
using c10::CachingDeviceAllocator::TraceEntry;

static const char* const kActions[] = {"alloc",        "free_requested", "free_completed", "segment_alloc", "segment_free",
                                       "segment_map", "segment_unmap",  "snapshot",       "oom"};

static void write_blocks(std::ostream& out, const c10::CachingDeviceAllocator::SegmentInfo& segment) {
  uint64_t address = segment.address;
  const char* comma = "";
  for (const auto& block : segment.blocks) {
    const char* state = block.allocated ? "active_allocated" : block.active ? "active_pending_free" : "inactive";
    out << comma << "{\"address\":" << address << ",\"size\":" << block.size
        << ",\"requested_size\":" << block.requested_size << ",\"state\":\"" << state << "\"}";
    address += block.size;
    comma = ",";
  }
}

static void write_snapshot(const std::string& path) {
  auto snapshot = allocator::snapshot();
  std::ofstream out(path);
  const char* comma = "";
  out << "{\"segments\":[";
  for (const auto& segment : snapshot.segments) {
    out << comma << "{\"device\":" << int(segment.device) << ",\"address\":" << segment.address
        << ",\"total_size\":" << segment.total_size << ",\"stream\":" << int64_t(segment.stream)
        << ",\"segment_type\":\"" << (segment.is_large ? "large" : "small") << "\",\"segment_pool_id\":["
        << segment.owner_private_pool_id.first << "," << segment.owner_private_pool_id.second
        << "],\"is_expandable\":" << (segment.is_expandable ? "true" : "false") << ",\"blocks\":[";
    write_blocks(out, segment);
    out << "]}";
    comma = ",";
  }
  out << "],\"device_traces\":[";
  comma = "";
  for (const auto& trace : snapshot.device_traces) {
    out << comma << "[";
    comma = "";
    for (const auto& entry : trace) {
      out << comma << "{\"action\":\"" << kActions[entry.action_] << "\",\""
          << (entry.action_ == TraceEntry::OOM ? "device_free" : "addr") << "\":" << entry.addr_
          << ",\"size\":" << entry.size_ << ",\"stream\":" << int64_t(entry.stream_) << "}";
      comma = ",";
    }
    out << "]";
    comma = ",";
  }
  const auto& config = snapshot.config_metadata;
  out << "],\"allocator_settings\":{\"PYTORCH_CUDA_ALLOC_CONF\":\"" << config.last_allocator_settings
      << "\",\"max_split_size\":" << int64_t(config.max_split_size)
      << ",\"garbage_collection_threshold\":" << config.garbage_collection_threshold
      << ",\"expandable_segments\":" << (config.expandable_segments ? "true" : "false") << "}}";
}

static c10::cuda::CUDAStream stream_of(uint64_t stream) {
  return c10::cuda::getStreamFromExternal(reinterpret_cast<cudaStream_t>(stream), c10::cuda::current_device());
}

static void mark_capture(bool begins) {
  stub_capturing = begins;
  // Told apart from private pools since 2.13.
  [begins](auto* native) {
    if constexpr (requires { native->markCaptureBegin(0); })
      begins ? native->markCaptureBegin(0) : native->markCaptureEnd(0);
  }(allocator::get());
}

int main(int, char** argv) {
  stub_total = strtoull(argv[1], nullptr, 10);
  stub_capacity = strtoull(argv[2], nullptr, 10);
  c10::cuda::_internal::setHasPrimaryContext([](c10::DeviceIndex) { return true; });
  c10::cuda::detail::init_p2p_access_cache(2);
  allocator::CUDAAllocatorConfig::set_expandable_segments_handle_type(
      allocator::Expandable_Segments_Handle_Type::POSIX_FD);
  allocator::init(2);
  std::unordered_map<long, c10::DataPtr> live;
  std::string verb, path;
  long id;
  uint64_t number, stream;
  double fraction;
  while (std::cin >> verb) {
    if (verb == "a") {
      std::cin >> id >> number >> stream;
      c10::cuda::setCurrentCUDAStream(stream_of(stream));
      live.erase(id);
      try {
        auto& held = live[id] = allocator::get()->allocate(number);
        std::cout << reinterpret_cast<uint64_t>(held.get()) << "\n";
      } catch (const c10::OutOfMemoryError& error) {
        std::cout << error.what_without_backtrace() << "\n";
        live.erase(id);
      }
    } else if (verb == "f") {
      std::cin >> id;
      live.erase(id);
    } else if (verb == "r") {
      std::cin >> id >> stream;
      if (auto held = live.find(id); held != live.end()) allocator::recordStream(held->second, stream_of(stream));
    } else if (verb == "c") {
      std::cin >> stream;
      stub_complete(reinterpret_cast<cudaStream_t>(stream));
    } else if (verb == "e") {
      allocator::emptyCache();
    } else if (verb == "m") {
      std::cin >> fraction;
      allocator::setMemoryFraction(fraction, c10::cuda::current_device());
    } else if (verb == "d") {
      std::cin >> id;
      c10::cuda::set_device(id);
    } else if (verb == "set") {
      std::cin >> path;
      c10::CachingAllocator::setAllocatorSettings(path);
    } else if (verb == "pb") {
      std::cin >> number >> stream;
      allocator::beginAllocateToPool(c10::cuda::current_device(), {number, 0},
                                     [stream](cudaStream_t other) { return uint64_t(other) == stream; });
    } else if (verb == "pe") {
      std::cin >> number;
      allocator::endAllocateToPool(c10::cuda::current_device(), {number, 0});
    } else if (verb == "pr") {
      std::cin >> number;
      allocator::releasePool(c10::cuda::current_device(), {number, 0});
    } else if (verb == "pm" || verb == "pM") {
      mark_capture(verb == "pm");
    } else if (verb == "h") {
      std::cin >> number;
      allocator::recordHistory(true, nullptr, number, allocator::RecordContext::NEVER, false, {});
    } else if (verb == "s") {
      std::cin >> path;
      write_snapshot(path);
    } else {
      std::cerr << "unknown request " << verb << "\n";
      return 2;
    }
  }
  std::cout.flush();
  std::_Exit(0);  // no destructors: what is live then would be freed after the allocator is gone
}
