"""Triton's model repository: the four graphs, `ddim` and the ensemble `mubic`, and where there is a sampler, the
ensemble `mubic_fixed`; and `mubic_stream`, which keeps live streams. For a CPU from a folder of ONNX graphs, for a GPU
from a folder of TensorRT plans. From AOTInductor's packages, for either, `mubic` is one model with all of the chain.

Every config.pbtxt is made from `graphs` and written through the protobuf schema that tritonclient ships."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts, Folder, sha256
from mubic_deploy.config import MAX_BATCH, Config
from mubic_deploy.engines import cpu
from mubic_deploy.engines.tensorrt import Plans
from mubic_deploy.errors import UserError, whole
from mubic_deploy.folders import replacing
from mubic_deploy.graphs import Signature
from mubic_deploy.live.settings import DEFAULTS, StreamSettings
from mubic_deploy.sources import source_dir
from mubic_deploy.triton import parameters
from mubic_deploy.triton.parameters import GraphSettings, PackageSettings

if TYPE_CHECKING:
    from mubic_deploy.engines.aotinductor import Packages  # needs PyTorch

CONFIG_FILE = "config.pbtxt"
PLAN = "model.plan"  # Triton's own name for it
MOST = 2**31 - 1  # int32, as Triton's configurations count
SEQUENCES = 1 << 16  # that Triton tells apart; the model holds fewer
POOL_BYTES = 2 << 30  # of the GPU's memory that a server should keep for what lies between the models, at least
# where the largest batch is so large at most, each size gets a CUDA graph, not only the `_sizes`
CAPTURE_ALL_UP_TO = 16
# whose requests are never refused: a clip's sound is soon done, and Triton (2.51) never ends an ensemble's request of
# which one step failed while another one ran; and in the loop most of a clip's work is done
PATIENT = ("audio_encoder", "denoiser")
_POWERS = tuple(2**n for n in range(11))
_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    graphs.BYTES: "TYPE_STRING",
}


def write_repository(
    artifacts: Artifacts,
    out: Path,
    *,
    engine: str = cpu.ENGINES[0],
    threads: int = 0,
    max_batch: int = MAX_BATCH,
    instances: Mapping[str, int] | None = None,
    queue_delay_us: int = 0,
    queue_timeout_s: float | None = None,
    call_denoiser: bool = False,
    streams: StreamSettings = DEFAULTS,
) -> None:
    """Writes the model repository for the CPU into the folder `out`, which is replaced if it is such a repository.

    engine: one of `cpu.ENGINES`; threads: of each graph, 0 for one a core; max_batch: samples that a model merges into
    one run, >= 1; instances: processes a model, by name, 1 where none is given; queue_delay_us: microseconds that a
    request waits for company in the models whose requests are batched, 0 merges only what waits already;
    queue_timeout_s: seconds after which one that still waits in such a model, or for `ddim`, is refused, but for those
    of PATIENT, None for never; call_denoiser: `ddim` calls the model `denoiser` at every step, as it does on a GPU,
    instead of running the graph itself, which is faster there. Only with calls are requests batched for `ddim`: by
    itself it runs one after the other. streams: limits of live streams.

    The repository names the ONNX files by absolute path and SHA-256: it serves these artefacts where they are.
    UserError if a setting is out of range or `out` holds something else."""
    config, precision = artifacts.config, artifacts.precision
    instances = dict(instances or {})
    models = {name: _settings(artifacts, name, engine, threads) for name in artifacts.signatures}
    _check(engine, max_batch, threads, instances, {*models, "ddim"})
    _check_queues(queue_delay_us, queue_timeout_s)
    taken = functools.partial(_late, config, precision, queue_timeout_s is not None)
    signatures = graphs.signatures(config, precision, sampler=True)
    configs = [_graph_model(config, taken(signatures[name]), settings) for name, settings in models.items()]
    configs.append(_ddim(config, precision, None if call_denoiser else models["denoiser"]))
    for model in configs:
        model.max_batch_size = max_batch
        if model.name != "ddim" or call_denoiser:
            _batched(model, queue_delay_us, queue_timeout_s)
        elif queue_timeout_s is not None:
            _batched(model, 0, queue_timeout_s)
            model.dynamic_batching.preferred_batch_size.append(1)  # only a batcher refuses; this one merges nothing
        model.instance_group.add(count=instances.get(model.name, 1), kind=ModelInstanceGroup.KIND_CPU)
    configs += [*_ensembles(artifacts, max_batch, taken), _stream(config, streams)]
    _write(configs, Path(out))


def _check_queues(delay_us: int, timeout_s: float | None) -> None:
    whole("queue delay", delay_us, 0, unit=" microseconds")
    if timeout_s is not None and not 1e-6 <= timeout_s <= MOST:
        raise UserError(f"queue timeout {timeout_s:g} is out of range: use seconds above 0, up to {MOST}")


def _batched(model: ModelConfig, delay_us: int, timeout_s: float | None) -> None:
    """Requests of this model are merged; see `write_repository`."""
    model.dynamic_batching.SetInParent()  # without a delay too
    model.dynamic_batching.max_queue_delay_microseconds = delay_us
    if timeout_s is not None and model.name not in PATIENT:
        policy = model.dynamic_batching.default_queue_policy
        policy.timeout_action = ModelQueuePolicy.REJECT
        policy.default_timeout_microseconds = round(1e6 * timeout_s)


@dataclass(frozen=True)
class GpuSettings:
    """instances       of each engine, on each GPU
    loops           instances of `ddim`: as many batches of clips step side by side, and none waits for another's loop
    queue_delay_us  microseconds that a request waits for company, in every engine and in `ddim`, so one by itself
                    waits for the encoders (side by side), for fusion, for the loop and for each of its steps; 0
                    merges only what waits already
    queue_timeout_s seconds after which a request that still waits for an engine, or for a loop, is refused; None for
                    never
    cuda_graphs     Triton captures each batch size of each engine and replays it: every one where the largest is at
                    most `CAPTURE_ALL_UP_TO`, else powers of two and the largest
    warm_up         requests of those sizes to each engine before the server says that it is ready"""

    instances: int = 1
    loops: int = 4
    queue_delay_us: int = 0
    queue_timeout_s: float | None = None
    cuda_graphs: bool = True
    warm_up: bool = True

    def __post_init__(self) -> None:
        for name in ("instances", "loops"):
            whole(name, getattr(self, name), 1, MOST)
        _check_queues(self.queue_delay_us, self.queue_timeout_s)


def write_gpu_repository(
    plans: Plans,
    out: Path,
    settings: GpuSettings = GpuSettings(),
    streams: StreamSettings = DEFAULTS,
) -> None:
    """Writes the model repository for an NVIDIA GPU into the folder `out`, which is replaced if it is such a
    repository: the plans as `tensorrt_plan` models, `ddim` that calls the denoiser, and the ensemble. Between the
    encoders and the map nothing leaves the GPU.

    The plans are copied: the repository is whole by itself. UserError if `out` holds something else."""
    config, precision = plans.config, plans.precision
    sizes = _sizes(plans.max_batch)
    # when a delay is over what waits is sent, and a client sends its own batch: of any size, and a graph is of one
    captured = list(range(1, plans.max_batch + 1)) if plans.max_batch <= CAPTURE_ALL_UP_TO else sizes
    configs, files = [], {}
    for name, signature in plans.signatures.items():
        model = _model(signature, config)
        model.platform, model.max_batch_size = "tensorrt_plan", plans.max_batch
        model.default_model_filename = PLAN
        _batched(model, settings.queue_delay_us, settings.queue_timeout_s)
        _prefers_largest(model)
        model.instance_group.add(count=settings.instances, kind=ModelInstanceGroup.KIND_GPU)
        if settings.cuda_graphs:
            model.optimization.cuda.graphs = True
            for batch in captured:
                model.optimization.cuda.graph_spec.add(batch_size=batch)
        if settings.warm_up:
            _warm_up(model, signature, captured if settings.cuda_graphs else sizes)
        configs.append(model)
        files[name] = plans.file(name)
    configs += [
        _gpu_ddim(config, precision, plans.max_batch, settings),
        python_model(graphs.host(), plans.max_batch, config),
    ]
    configs += [*_ensembles(plans, plans.max_batch, lambda signature: signature), _stream(config, streams)]
    _write(configs, Path(out), files)


def write_package_repository(
    packages: Packages,
    out: Path,
    *,
    threads: int = 0,
    instances: int = 1,
    queue_delay_us: int = 0,
    queue_timeout_s: float | None = None,
    streams: StreamSettings = DEFAULTS,
) -> None:
    """Writes the model repository for compiled packages into the folder `out`, which is replaced if it is such a
    repository. `mubic` is one model there, not an ensemble: a process that has PyTorch runs the whole chain, so that a
    clip goes up to a GPU once and its map comes back. Where a batch asks for the sampler's steps, the sampler makes
    them.

    threads: on a CPU, 0 for one a core; instances: processes, each with weights and CUDA graphs of its own; the others
    as for `write_repository`. Largest batch: the packages'. The repository names the packages by absolute path and
    SHA-256: it serves them where they are. UserError if a setting is out of range or `out` holds something else."""
    on_gpu = packages.device.type == "cuda"
    if on_gpu and threads:
        raise UserError("threads are for packages of a CPU, these are of a GPU: leave them out")
    _check_processes(threads, {graphs.ENSEMBLE: instances})
    _check_queues(queue_delay_us, queue_timeout_s)
    manifest = (packages.path / packages.LAYOUT.manifest).resolve()
    sizes = _sizes(packages.max_batch) if on_gpu else []
    settings = PackageSettings(manifest, sha256(manifest), threads, tuple(reversed(sizes)))
    source = {parameters.SOURCE: json.dumps(packages.source)}
    model = python_model(graphs.pipeline(packages.config), packages.max_batch, packages.config, instances)
    for key, value in {**source, **settings.to_strings()}.items():
        model.parameters[key].string_value = value
    _batched(model, queue_delay_us, queue_timeout_s)
    _prefers_largest(model)
    _write([model, _stream(packages.config, streams)], Path(out))


def _sizes(max_batch: int) -> list[int]:
    """Powers of two, and the largest: it is what a client that has more sends."""
    return sorted({max_batch, *(n for n in _POWERS if n <= max_batch)})


def _prefers_largest(model: ModelConfig) -> None:
    """And no smaller one: without a delay Triton closes a batch that waits for a busy model at the first preferred
    size that it reaches (`GetDynamicBatch` in core's dynamic_batch_scheduler.cc)."""
    if model.max_batch_size > 1:
        model.dynamic_batching.preferred_batch_size.append(model.max_batch_size)


def pool_bytes(plans: Plans, settings: GpuSettings) -> int:
    """Of the GPU's memory that a server should keep for what lies between the models: twice what all its loops hold
    with the largest batches, and POOL_BYTES at least."""
    tensors = [t for signature in plans.signatures.values() for t in signature.outputs]
    clip = sum(t.nbytes for t in tensors)
    return max(POOL_BYTES, 2 * settings.loops * plans.max_batch * clip)


def _gpu_ddim(config: Config, precision: str, max_batch: int, settings: GpuSettings) -> ModelConfig:
    model = _ddim(config, precision, None)
    model.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "no"
    model.max_batch_size = max_batch
    _batched(model, settings.queue_delay_us, settings.queue_timeout_s)
    # the loop itself computes nothing: its tensors are on the GPU, its process is not
    model.instance_group.add(count=settings.loops, kind=ModelInstanceGroup.KIND_CPU)
    return model


def _warm_up(model: ModelConfig, signature: Signature, batches: list[int]) -> None:
    """Random pictures, sound and features; steps of zero, because a random one is no step."""
    for batch in batches:
        request = model.model_warmup.add(name=f"batch {batch}", batch_size=batch, count=1)
        for tensor in signature.inputs:
            given = request.inputs[tensor.name]
            given.data_type = DataType.Value(_TYPES[tensor.dtype])
            given.dims.extend(tensor.shape)
            # random bits are no step, and no sound: there is NaN among them, which models on a CPU refuse
            zero = tensor.name in ("STEP", "AUDIO")
            setattr(given, "zero_data" if zero else "random_data", True)


def _settings(artifacts: Artifacts, graph: str, engine: str, threads: int) -> GraphSettings:
    file = artifacts.file(graph).resolve()
    return GraphSettings(engine, file, artifacts.manifest["graphs"][graph]["sha256"], artifacts.precision, threads)


def _check(engine: str, max_batch: int, threads: int, instances: Mapping[str, int], names: set[str]) -> None:
    if engine not in cpu.ENGINES:
        raise UserError(f"unknown engine {engine!r} for a CPU: use {' or '.join(cpu.ENGINES)}")
    whole("max_batch", max_batch, 1, MOST)
    for name in instances:
        if name not in names:
            raise UserError(f"there is no model {name!r} to give instances to: choose from {', '.join(sorted(names))}")
    _check_processes(threads, instances)


def _check_processes(threads: int, instances: Mapping[str, int]) -> None:
    whole("threads", threads, 0, MOST, use=f"1 to {MOST}, or 0 for one a core")
    for name, count in instances.items():
        whole(f"instances of {name}", count, 1, MOST)


def _model(signature: Signature, config: Config, **extra: str) -> ModelConfig:
    """What all the models have: name, inputs, outputs, parameters."""
    model = ModelConfig(name=signature.name)
    for tensor in signature.inputs:
        model.input.add(name=tensor.name, data_type=DataType.Value(_TYPES[tensor.dtype]), dims=tensor.shape)
    for tensor in signature.outputs:
        model.output.add(name=tensor.name, data_type=DataType.Value(_TYPES[tensor.dtype]), dims=tensor.shape)
    for key, value in {parameters.CONFIG: parameters.config_to_string(config), **extra}.items():
        model.parameters[key].string_value = value
    return model


def _graph_model(config: Config, signature: Signature, settings: GraphSettings) -> ModelConfig:
    """A graph in an engine on the CPU, through the Python backend."""
    model = _model(signature, config, **settings.to_strings())
    model.backend = "python"
    return model


def _ddim(config: Config, precision: str, denoiser: GraphSettings | None) -> ModelConfig:
    """The loop. It answers with the denoiser's own S_0, which Triton reshapes: no tensor is touched for that."""
    model = _model(graphs.ddim(config, precision), config, **(denoiser.to_strings() if denoiser else {}))
    model.backend = "python"
    saliency = next(output for output in model.output if output.name == "SALIENCY")
    saliency.reshape.shape.extend((1, *config.map_size))
    return model


def python_model(signature: Signature, max_batch: int, config: Config, instances: int = 1) -> ModelConfig:
    """A model of the Python backend that gets its tensors on the host."""
    model = _model(signature, config)
    model.backend, model.max_batch_size = "python", max_batch
    model.instance_group.add(count=instances, kind=ModelInstanceGroup.KIND_CPU)
    return model


def _stream(config: Config, streams: StreamSettings) -> ModelConfig:
    """The model of live streams. One process holds them all: Triton's batcher gives it a sequence's requests in
    order, and it answers each as its windows are done, while those of other streams go on (decoupled)."""
    model = _model(graphs.stream(config), config, **{parameters.MAX_STREAMS: str(streams.max_streams)})
    for given in model.input:
        given.optional = True
    model.backend, model.max_batch_size = "python", 0
    model.model_transaction_policy.decoupled = True
    model.sequence_batching.max_sequence_idle_microseconds = round(streams.idle_s * 1e6)
    # Triton's places cost nothing; the model itself says when it holds enough, so that nobody queues behind
    # sequences that were abandoned
    model.sequence_batching.oldest.max_candidate_sequences = SEQUENCES
    model.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    return model


def _late(config: Config, precision: str, refuses: bool, signature: Signature) -> Signature:
    """What a model takes on a CPU: fusion the sound too, to look at it, and the noise something of fusion's, to be
    later; and if it refuses what waited too long, the visual encoder something of the audio encoder's. So a request
    fails when nothing else of it runs: Triton (2.51) never ends an ensemble's request of which one step fails while
    another one runs. On a GPU the sound comes to no model that could look at it, what is of fusion's would have to
    come to the host, and an engine takes nothing more."""
    more = {"noise": [graphs.ADAPTIVE_STEPS]}
    if config.has_audio:
        more["fusion"] = [graphs.audio()]
        more["visual_encoder"] = [graphs.audio_features(config, precision)] if refuses else []
    return replace(signature, inputs=(*signature.inputs, *more.get(signature.name, [])))


def _ensembles(folder: Folder, max_batch: int, taken: Callable[[Signature], Signature]) -> list[ModelConfig]:
    """`mubic`; and with a sampler `mubic_fixed`, and `noise`, which draws its noise. taken: what a model takes and
    gives, where that is more than its graph."""
    config, signatures = folder.config, folder.signatures
    sampler = signatures.pop(graphs.SAMPLER, None)
    conditioning = [taken(s) for s in signatures.values() if s.name != "denoiser"]
    source = {parameters.SOURCE: json.dumps(folder.source)}
    loop = graphs.ddim(config, folder.precision)
    models = [_ensemble(_model(graphs.pipeline(config), config, **source), [*conditioning, loop], max_batch)]
    if sampler is not None:
        fixed = _model(graphs.fixed_pipeline(config), config, **source)
        fixed.parameters[parameters.FIXED_STEPS].string_value = str(folder.fixed_steps)
        noise = taken(graphs.noise(config))
        models += [
            python_model(noise, max_batch, config),
            _ensemble(fixed, [*conditioning, noise, sampler], max_batch),
        ]
    return models


def _ensemble(model: ModelConfig, chain: list[Signature], max_batch: int) -> ModelConfig:
    """The chain as one model. A tensor has one name everywhere, so every map of names is the identity."""
    model.platform = "ensemble"
    model.max_batch_size = max_batch
    wanted = {t.name for signature in chain for t in signature.inputs} | {output.name for output in model.output}
    for signature in chain:
        step = model.ensemble_scheduling.step.add(model_name=signature.name, model_version=-1)
        step.input_map.update({t.name: t.name for t in signature.inputs})
        step.output_map.update({t.name: t.name for t in signature.outputs if t.name in wanted})
    return model


def _write(configs: list[ModelConfig], out: Path, plans: Mapping[str, Path] = MappingProxyType({})) -> None:
    """Beside `out` first, then renamed: a repository is whole or not there. plans: files to copy, by model."""
    require_repository(out)
    try:
        with replacing(out) as fresh:
            for model in configs:
                version = fresh / model.name / "1"  # an ensemble needs the folder too, with nothing in it
                version.mkdir(parents=True)
                (fresh / model.name / CONFIG_FILE).write_text(text_format.MessageToString(model))
                if model.backend == "python":
                    shutil.copyfile(source_dir("triton_models") / model.name / "1" / "model.py", version / "model.py")
                if model.name in plans:
                    shutil.copyfile(plans[model.name], version / PLAN)
    except OSError as error:
        raise _unwritable(out, error) from None


def _unwritable(out: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"the model repository {out} cannot be written ({reason}): make room, or choose another folder")


def require_repository(out: Path) -> None:
    """UserError unless a repository may be written to `out`: it is new, an empty folder, or a repository of ours and
    nothing else."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not _is_repository(out):
            raise UserError(f"{out} exists and is no model repository: give another folder or remove it")
        ours = {graphs.ENSEMBLE, graphs.FIXED_ENSEMBLE, *(p.name for p in source_dir("triton_models").iterdir())}
        if strange := sorted(entry.name for entry in out.iterdir() if entry.name not in ours):
            raise UserError(f"{out} would be replaced, but holds {strange[0]} too: give another folder, or move that")
    except OSError as error:
        raise _unwritable(out, error) from None


def _is_repository(path: Path) -> bool:
    return (path / graphs.ENSEMBLE / CONFIG_FILE).is_file()
