"""SynthSpec: everything that can be asked of a synthesized step, and what cannot be asked together.

The fields are the options of ``tracesim synth``; a YAML file with the same names (``--config``) and the Python call
``sim.synthesize`` fill the same struct.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from sim.errors import InputError, UserError, nearest
from sim.graph import OpGraph
from sim.yaml_text import parse_yaml

Dtype = Literal["float16", "bfloat16", "float32"]
# Beyond these a tensor's bytes overflow PyTorch's 64-bit sizes: a slip of the keyboard, told in one line.
MOST = 1 << 20
MOST_TOKENS = 1 << 30


class SynthSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to synthesize.

    ``batch`` is the sequences (or images) of one micro-batch on each data-parallel rank, ``seq`` the tokens of each;
    ``parallel`` is a plan such as ``fsdp=4,tp=2``; ``liveness`` says when a forward's intermediates are freed.
    ``schedule`` is a pipeline's, with ``stages_per_rank`` for the interleaved one (2 unless told); ``stage_layers``
    deals out layers otherwise than evenly, as ``8,9,9,6``.
    ``dtype`` is that of the parameters: float16 in forward and float32 in training unless told; ``autocast`` the one
    that autocast computes in; with ``tf32`` products of float32 run in TF32 where the device has it; ``channels_last``
    is the memory format of an image model; ``master_weights`` are float32 copies of the parameters that the optimizer
    works on.  ``optimizer_kernels`` are PyTorch's foreach (its default on CUDA), fused or for-loop implementations.
    ``fsdp_dtype`` and ``fsdp_reduce_dtype`` are FSDP's mixed precision; ``bucket_mib`` is DDP's bucket size.
    """

    model: str
    batch: int
    seq: int | None = None
    mode: Literal["forward", "train"] = "forward"
    dtype: Dtype | None = None
    task: Literal["auto", "causal-lm", "question-answering", "seq2seq-lm", "image-classification"] = "auto"
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    parallel: str = ""
    sequence_parallel: bool = False
    liveness: Literal["eager", "export"] = "eager"
    autocast: Literal["float16", "bfloat16"] | None = None
    tf32: bool = False
    channels_last: bool = False
    loss_scaling: bool = False
    master_weights: bool = False
    optimizer: Literal["adamw", "sgd", "adafactor", "none"] = "adamw"
    optimizer_kernels: Literal["foreach", "fused", "for-loop"] = "foreach"
    momentum: float = 0.0
    max_grad_norm: float | None = None
    micro_batches: int = 1
    checkpoint: Literal["none", "full", "selective"] = "none"
    bucket_mib: float | None = None
    gradient_as_bucket_view: bool = False
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    stages_per_rank: int | None = None
    stage_layers: str = ""
    reshard_after_forward: bool = True
    fsdp_dtype: Dtype | None = None
    fsdp_reduce_dtype: Dtype | None = None

    @property
    def training(self) -> bool:
        return self.mode == "train"

    @property
    def parameter_dtype(self) -> Dtype:
        return self.dtype or ("float32" if self.training else "float16")

    @property
    def stages_of_a_rank(self) -> int:
        return self.stages_per_rank or (2 if self.schedule == "interleaved" else 1)

    @property
    def pipelined(self) -> bool:
        return "pp=" in self.parallel

    def on_one_gpu(self) -> SynthSpec:
        """The same step without a plan; micro-batches that a forward pipelines are one batch.  What FSDP computes in
        lower precision than it keeps, one GPU does with master weights."""
        plain = {field: _DEFAULTS[field] for field in _PLAN_FIELDS}
        if self.fsdp_dtype not in (None, "float32") and self.parameter_dtype == "float32":
            plain |= {"dtype": self.fsdp_dtype, "master_weights": self.optimizer != "none"}
        if not self.training:
            plain |= {"batch": self.batch * self.micro_batches, "micro_batches": 1}
        return msgspec.structs.replace(self, **plain)

    def check(self) -> None:
        """Raise UserError with every option that cannot be, or not with the others, in one line."""
        problems = [f"--{_option(problem)}" for problem in _field_problems(msgspec.structs.asdict(self))]
        problems = problems or [*self._sizes(), *self._training_options(), *self._precision(), *self._plan()]
        problems = problems or list(self._pipeline())
        if problems:
            raise UserError("; ".join(problems))

    def _sizes(self) -> Iterator[str]:
        for name, value in (("batch", self.batch), ("seq", self.seq), ("micro-batches", self.micro_batches)):
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
            elif value is not None and value > MOST:
                yield f"--{name} {value}: must be at most {MOST}"
        if (self.batch if self.seq is None else self.batch * self.seq) > MOST_TOKENS:
            yield f"--batch {self.batch} and --seq {self.seq}: must be at most {MOST_TOKENS} tokens together"
        for name, size in (("bucket-mib", self.bucket_mib), ("max-grad-norm", self.max_grad_norm)):
            if size is not None and not size > 0:
                yield f"--{name} {size:g}: must be more than 0"
        if not 0 <= self.momentum < math.inf:
            yield f"--momentum {self.momentum:g}: must be a number that is not negative"

    def _training_options(self) -> Iterator[str]:
        if self.training:
            if self.liveness == "export":
                yield "--liveness export: an exported module runs forward only; leave it out with --mode train"
            if self.momentum and self.optimizer != "sgd":
                yield f"--momentum {self.momentum:g}: is an option of --optimizer sgd, not of {self.optimizer}"
            if self.optimizer == "adafactor" and self.optimizer_kernels == "fused":
                yield "--optimizer-kernels fused: PyTorch has no fused Adafactor; choose foreach or for-loop"
            if self.optimizer == "none" and self.optimizer_kernels != "foreach":
                yield f"--optimizer-kernels {self.optimizer_kernels}: is an option of an optimizer; choose one"
            if self.optimizer == "adafactor" and ("fsdp=" in self.parallel or "tp=" in self.parallel):
                yield f"--optimizer adafactor: PyTorch's cannot step what --parallel {self.parallel} shards"
            return
        for field in _TRAINING_FIELDS:
            if field == "micro_batches" and self.pipelined:
                continue
            if getattr(self, field) != _DEFAULTS[field]:
                yield f"--{_option(field)}: is an option of --mode train"

    def _precision(self) -> Iterator[str]:
        if self.autocast and self.parameter_dtype != "float32":
            yield f"--autocast {self.autocast}: keeps parameters in float32; leave out --dtype {self.parameter_dtype}"
        if self.loss_scaling and self.parameter_dtype != "float32" and not self.master_weights:
            yield "--loss-scaling: unscales float32 gradients; use --dtype float32 with --autocast float16"
        if self.master_weights and self.parameter_dtype == "float32":
            yield "--master-weights: are float32 copies of parameters in half precision; choose --dtype float16"
        if self.master_weights and "fsdp=" in self.parallel:
            yield "--master-weights: fsdp keeps float32 parameters itself; use --fsdp-dtype"
        if self.master_weights and self.optimizer == "none":
            yield "--master-weights: is an option of an optimizer; choose one"
        if self.tf32 and self.parameter_dtype != "float32":
            yield f"--tf32: no product of --dtype {self.parameter_dtype} is in float32; choose --dtype float32"
        if self.attention == "flash" and (self.autocast or self.fsdp_dtype or self.parameter_dtype) == "float32":
            yield "--attention flash: computes in half precision; choose --dtype or --autocast float16 or bfloat16"

    def _plan(self) -> Iterator[str]:
        sharded, replicated = ("fsdp=" in self.parallel, "dp=" in self.parallel.replace("fsdp=", ""))
        if sharded and not self.training:
            yield f"--parallel {self.parallel}: fsdp is for --mode train"
        for field in ("fsdp_dtype", "fsdp_reduce_dtype", "reshard_after_forward"):
            if not sharded and getattr(self, field) != _DEFAULTS[field]:
                yield f"--{_option(field)}: needs an fsdp axis, as in --parallel fsdp=8"
        for field in ("bucket_mib", "gradient_as_bucket_view"):
            if (sharded or not replicated) and getattr(self, field) != _DEFAULTS[field]:
                yield f"--{_option(field)}: is DistributedDataParallel's, which --parallel dp=8 runs in"
        if self.sequence_parallel and "tp=" not in self.parallel:
            yield "--sequence-parallel: needs a tp axis, as in --parallel tp=8"
        if self.loss_scaling and "tp=" in self.parallel:
            yield "--loss-scaling: PyTorch's GradScaler refuses tensor-parallel parameters beside whole ones"

    def _pipeline(self) -> Iterator[str]:
        if not self.pipelined:
            for field in ("schedule", "stages_per_rank", "stage_layers"):
                if getattr(self, field) != _DEFAULTS[field]:
                    yield f"--{_option(field)}: needs a pp axis, as in --parallel pp=4"
            return
        if "pp=1" in self.parallel.split(","):
            yield f"--parallel {self.parallel}: a pipeline has at least two stages; leave pp=1 out"
        if self.stages_per_rank is not None and self.stages_per_rank < 1:
            yield f"--stages-per-rank {self.stages_per_rank}: must be at least 1"
        if self.schedule != "interleaved" and self.stages_of_a_rank > 1:
            yield f"--stages-per-rank {self.stages_per_rank}: only --schedule interleaved has several"
        if self.loss_scaling:
            yield "--loss-scaling: leave it out with a pp axis, where each stage would find its own overflows"
        if self.liveness == "export":
            yield "--liveness export: an exported module is one program; leave it out with a pp axis"


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(SynthSpec)}
_PLAN_FIELDS = (
    "parallel", "sequence_parallel", "bucket_mib", "gradient_as_bucket_view", "reshard_after_forward", "fsdp_dtype",
    "fsdp_reduce_dtype", "schedule", "stages_per_rank", "stage_layers",
)  # fmt: skip
_TRAINING_FIELDS = (
    "autocast", "loss_scaling", "master_weights", "optimizer", "optimizer_kernels", "momentum", "max_grad_norm",
    "micro_batches", "checkpoint", "schedule", "stages_per_rank", "gradient_as_bucket_view", "bucket_mib",
    "fsdp_dtype", "fsdp_reduce_dtype", "reshard_after_forward",
)  # fmt: skip


def from_options(**given: Any) -> SynthSpec:
    """The spec of options given one by one; None is an option that was not given."""
    fields = {key: value for key, value in given.items() if value is not None}
    problems = list(_field_problems(fields))
    if problems:
        raise UserError("; ".join(f"--{_option(problem)}" for problem in problems))
    return SynthSpec(**fields)


def from_file(path: Path, **given: Any) -> SynthSpec:
    """The spec that a YAML file describes; ``given`` values that are not None go before the file's.

    Raises InputError with every problem of the file at once.
    """
    try:
        said = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise InputError(path, "no such file; it holds the options of `tracesim synth`, as `batch: 16`") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); give a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(path, "is not UTF-8 text; give a YAML file of options, as `batch: 16`") from None
    fields = {key.replace("-", "_"): value for key, value in said.items()}
    twice = [key for key in said if "-" in key and key.replace("-", "_") in said]
    if twice:
        raise InputError(path, f"{', '.join(twice)}: stands there twice, with - and with _; leave one out")
    fields |= {key: value for key, value in given.items() if value is not None}
    problems = list(_field_problems(fields))
    if problems:
        raise InputError(path, "; ".join(problems))
    return msgspec.convert(fields, SynthSpec)


def _field_problems(fields: dict[str, Any]) -> Iterator[str]:
    """Every unknown, missing or ill-typed field: each is converted alone, beside values that are right."""
    known = {field.name: field for field in msgspec.structs.fields(SynthSpec)}
    for key, value in fields.items():
        if key not in known:
            yield f"{key}: is no option; {nearest(key, known)}"
            continue
        try:
            msgspec.convert(value, known[key].type)
        except msgspec.ValidationError as error:
            words = ", ".join(_words(known[key].type))
            yield f"{key}: {value!r} is none of {words}" if words else f"{key}: {error}"
    for key, what in (("model", "the model to synthesize"), ("batch", "sequences or images a rank")):
        if key not in fields:
            yield f"{key} is missing: {what}"


def _words(kind: Any) -> tuple[str, ...]:
    """The words that a field takes, where it takes words only."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for part in get_args(kind) for word in _words(part))


def _option(text: str) -> str:
    """A field's name, at the beginning of a text, as an option is written."""
    name, colon, rest = text.partition(":")
    return name.replace("_", "-") + colon + rest


def spec_of(graph: OpGraph) -> SynthSpec | None:
    """The options that a workload was synthesized from, as it says itself; None for a trace."""
    fields = {f.name for f in msgspec.structs.fields(SynthSpec)}
    given = {key: value for key, value in graph.provenance.items() if key in fields}
    try:
        return msgspec.convert(given, SynthSpec, strict=False)
    except msgspec.ValidationError:
        return None
