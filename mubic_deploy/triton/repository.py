"""Triton's model repository for a folder of artefacts: the four graphs, `ddim` and the ensemble `mubic`.

Every config.pbtxt is made from `graphs` and written through the protobuf schema that tritonclient ships."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from mubic_deploy import graphs
from mubic_deploy.artifacts import Artifacts
from mubic_deploy.config import Config
from mubic_deploy.errors import UserError
from mubic_deploy.folders import replacing
from mubic_deploy.graphs import Signature
from mubic_deploy.sources import source_dir
from mubic_deploy.triton import parameters
from mubic_deploy.triton.parameters import OnnxSettings

CONFIG_FILE = "config.pbtxt"
_TYPES = {
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
}


def write_repository(
    artifacts: Artifacts,
    out: Path,
    *,
    threads: int = 0,
    max_batch: int = 8,
    instances: Mapping[str, int] | None = None,
    call_denoiser: bool = False,
) -> None:
    """Writes the model repository for the CPU into the folder `out`, which is replaced if it is such a repository.

    threads: of each graph, 0 for one a core; max_batch: samples that a model merges into one run, >= 1;
    instances: processes a model, by name, 1 where none is given; call_denoiser: `ddim` calls the model `denoiser` at
    every step, as it does on a GPU, instead of running the graph itself, which is faster there. Only with
    calls are requests batched for `ddim`: by itself it runs one after the other.

    The repository names the ONNX files by absolute path and SHA-256: it serves these artefacts where they are.
    UserError if a setting is out of range or `out` holds something else."""
    config, precision = artifacts.config, artifacts.precision
    instances = dict(instances or {})
    models = {name: _settings(artifacts, name, threads) for name in graphs.signatures(config)}
    _check(max_batch, threads, instances, {*models, "ddim"})
    configs = [_onnx_model(config, precision, name, settings) for name, settings in models.items()]
    configs.append(_ddim(config, precision, None if call_denoiser else models["denoiser"]))
    for model in configs:
        model.max_batch_size = max_batch
        if model.name != "ddim" or call_denoiser:
            # without a delay: what waits already is merged, nobody waits for company
            model.dynamic_batching.SetInParent()
        model.instance_group.add(count=instances.get(model.name, 1), kind=ModelInstanceGroup.KIND_CPU)
    configs.append(_ensemble(config, precision, max_batch, artifacts.manifest["source"]))
    _write(configs, Path(out))


def _settings(artifacts: Artifacts, graph: str, threads: int) -> OnnxSettings:
    file = artifacts.graph(graph).resolve()
    return OnnxSettings(file, artifacts.manifest["graphs"][graph]["sha256"], artifacts.precision, threads)


def _check(max_batch: int, threads: int, instances: Mapping[str, int], names: set[str]) -> None:
    if max_batch < 1:
        raise UserError(f"max_batch {max_batch} is out of range: use 1 or more")
    if threads < 0:
        raise UserError(f"threads {threads} is out of range: use 1 or more, or 0 for one a core")
    for name, count in instances.items():
        if name not in names:
            raise UserError(f"there is no model {name!r} to give instances to: choose from {', '.join(sorted(names))}")
        if count < 1:
            raise UserError(f"{count} instances of {name} are out of range: use 1 or more")


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


def _onnx_model(config: Config, precision: str, graph: str, settings: OnnxSettings) -> ModelConfig:
    """A graph in ONNX Runtime, through the Python backend."""
    model = _model(graphs.signatures(config, precision)[graph], config, **settings.to_strings())
    model.backend = "python"
    return model


def _ddim(config: Config, precision: str, denoiser: OnnxSettings | None) -> ModelConfig:
    """The loop. It answers with the denoiser's own S_0, which Triton reshapes: no tensor is touched for that."""
    model = _model(graphs.ddim(config, precision), config, **(denoiser.to_strings() if denoiser else {}))
    model.backend = "python"
    saliency = next(output for output in model.output if output.name == "SALIENCY")
    saliency.reshape.shape.extend((1, *config.map_size))
    return model


def _ensemble(config: Config, precision: str, max_batch: int, source: dict) -> ModelConfig:
    """The chain. A tensor has one name everywhere, so every map of names is the identity."""
    model = _model(graphs.pipeline(config), config, **{parameters.SOURCE: json.dumps(source)})
    model.platform = "ensemble"
    model.max_batch_size = max_batch
    chain = [s for s in graphs.signatures(config, precision).values() if s.name != "denoiser"]
    wanted = {t.name for s in (*chain, graphs.ddim(config, precision)) for t in s.inputs} | {"SALIENCY", "STEPS_USED"}
    for signature in (*chain, graphs.ddim(config, precision)):
        step = model.ensemble_scheduling.step.add(model_name=signature.name, model_version=-1)
        step.input_map.update({t.name: t.name for t in signature.inputs})
        step.output_map.update({t.name: t.name for t in signature.outputs if t.name in wanted})
    return model


def _write(configs: list[ModelConfig], out: Path) -> None:
    """Beside `out` first, then renamed: a repository is whole or not there."""
    try:
        if out.exists() and not (out.is_dir() and (_is_repository(out) or not any(out.iterdir()))):
            raise UserError(f"{out} exists and is no model repository: give another folder or remove it")
        with replacing(out) as fresh:
            for model in configs:
                version = fresh / model.name / "1"  # an ensemble needs the folder too, with nothing in it
                version.mkdir(parents=True)
                (fresh / model.name / CONFIG_FILE).write_text(text_format.MessageToString(model))
                if model.backend == "python":
                    shutil.copyfile(source_dir("triton_models") / model.name / "1" / "model.py", version / "model.py")
    except OSError as error:
        raise UserError(f"the model repository {out} cannot be written: {error}") from None


def _is_repository(path: Path) -> bool:
    return (path / graphs.ENSEMBLE / CONFIG_FILE).is_file()
