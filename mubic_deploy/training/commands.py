"""What the command line does about scenes, training and evaluation. Each function returns the exit code."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from mubic_deploy.commands import predictor
from mubic_deploy.config import get_config
from mubic_deploy.console import bar, messages, print_json, say, screen, warn
from mubic_deploy.errors import UserError
from mubic_deploy.training.check import CheckReport, check
from mubic_deploy.training.layout import (
    Video,
    datasets,
    has_list,
    in_both,
    listing,
    once,
    read_list,
    write_map,
)
from mubic_deploy.training.settings import DATASETS, PARTS, RECIPES, Settings

LINE_S = 60
NAME_WIDTH = 22  # beside which the figures fit into 80 columns
FITTING = {"dataset": None, "split": 1, "fit": None, "clips": 64, "stride": 4}  # pack's, for --fit-steps
HEADINGS = {"cc": "CC", "nss": "NSS", "sim": "SIM", "auc_judd": "AUC-J", "auc_shuffled": "s-AUC"}


def scenes(arguments: Namespace) -> int:
    """Rendered scenes into a folder."""
    from mubic_deploy.scenes.write import ENOUGH, write_scenes

    began = time.monotonic()
    with bar("rendering") as progress:
        write_scenes(
            arguments.out,
            arguments.videos,
            arguments.seed,
            arguments.seconds,
            arguments.workers,
            lambda done, total: progress("rendering scenes", done, total),
        )
    seconds = time.monotonic() - began
    if arguments.json:
        print_json({"out": str(arguments.out), "videos": arguments.videos, "seed": arguments.seed, "seconds": seconds})
    else:
        enough = arguments.videos >= ENOUGH
        use = f"train with mubic-deploy train {arguments.out}" if enough else f"too few to train on, render {ENOUGH}"
        say(f"{arguments.videos} scenes in {arguments.out} in {seconds:.0f} s: {use}")
    return 0


def train(arguments: Namespace) -> int:
    """A model from a data folder, or with --check only what is wrong with the folder."""
    training, said = _videos(arguments, "train")
    validation, also = _videos(arguments, "test")
    said = list(dict.fromkeys(said + also))
    if arguments.out is None and not arguments.check:
        raise UserError("there is nowhere to write to: give --out RUN, or --check to look at the data only")
    settings = _settings(arguments)
    hears = get_config(settings.config, settings.variant).has_audio
    if arguments.check:
        report = _check(training + validation, arguments.deep, sounds=hears)
        return _print_check(report, said + in_both(training, validation) + report.warnings, arguments.json)

    from mubic_deploy.training.machine import Machine, make_fabric
    from mubic_deploy.training.run import Run
    from mubic_deploy.training.train import train as fit

    warnings: list[str] = []

    def note(text: str) -> None:
        warnings.append(text)
        warn([text])

    machine = Machine(arguments.accelerator, arguments.devices, arguments.workers)
    if make_fabric(machine, settings.precision).is_global_zero:
        run = Run(arguments.out, settings, [])  # of no videos: only whose the folder is
        with run.alone():  # before the data are looked at, which takes minutes; `train` looks again
            if not arguments.resume:
                run.require_new()
        report = _check(training + validation, arguments.deep, sounds=hears)
        report.require()
        for text in said + report.brief():
            note(text)
    else:  # Fabric runs the whole command once a device: one of them speaks
        messages.quiet = True
    began = time.monotonic()
    with bar("training") as watched:
        progress = watched if messages.is_terminal else _lines()
        finished = fit(
            settings,
            training,
            validation,
            arguments.out,
            resume=arguments.resume,
            prepare=lambda model: _prepare(model, arguments, settings),
            machine=machine,
            progress=progress,
            note=note,
        )
    if finished is None:
        return 0
    from mubic_deploy.training.state import STATE, load_state

    last = load_state(arguments.out / STATE, tensors=False).history[-1]
    if arguments.json:
        seconds = time.monotonic() - began
        print_json({"checkpoint": str(finished), "seconds": seconds, "last_epoch": last, "warnings": warnings})
    else:
        scores = ", ".join(f"{HEADINGS[k]} {last[k]:.3f}" for k in ("cc", "nss", "sim"))
        say(f"{finished}: {scores} on the test part, in {time.monotonic() - began:.0f} s")
        say(f"  try it: mubic-deploy predict FILM.mp4 -o OVERLAY.mp4 --checkpoint {finished}")
    return 0


def _lines() -> Callable[[str, int, int], None]:
    """Progress without a terminal, as for a run that is left alone: a line on stderr each minute, for its log."""
    said = 0.0

    def progress(text: str, done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_S or done == total:
            said = time.monotonic()
            messages.print(f"{text} ({done} of {total})", markup=False, highlight=False, soft_wrap=True)

    return progress


def listen(arguments: Namespace) -> int:
    """An audio encoder that tells the sounds of scenes apart."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from mubic_deploy.media.outputs import check_targets, replacing
    from mubic_deploy.training.listen import listen as run

    out = {"weights": arguments.out}
    check_targets(out, {"weights": (".safetensors",)}, None)
    began = time.monotonic()
    with bar("listening") as watched:
        progress = watched if messages.is_terminal else _lines()
        encoder, right, octaves = run(get_config(arguments.config), arguments.seed, arguments.steps, progress)
    weights = {f"audio_encoder.{name}": value.contiguous() for name, value in encoder.state_dict().items()}
    try:
        with replacing(out) as staged:
            save_file(weights, staged["weights"])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{arguments.out} cannot be written ({error}): choose another file") from None
    seconds = time.monotonic() - began
    if arguments.json:
        print_json({"weights": str(arguments.out), "kinds_right": right, "octaves_off": octaves, "seconds": seconds})
    else:
        said = f"{100 * right:.0f} % of kinds named rightly, pitches off by {octaves:.2f} octaves"
        say(f"{arguments.out}: {said}, in {seconds:.0f} s; train with --vggish {arguments.out}")
    return 0


def evaluate(arguments: Namespace) -> int:
    """Metrics of a model over a part of a data folder."""
    videos, said = _videos(arguments, *(PARTS if arguments.part == "all" else (arguments.part,)))
    if arguments.sounds and len(videos) < 2:
        raise UserError("--sounds swaps the sounds of videos, and there is only one: leave it out")
    out: Path | None = arguments.save_maps
    if out is not None and out.exists() and (not out.is_dir() or listing(out)):
        raise UserError(f"{out} exists and is no empty folder: choose another --save-maps")
    _check(videos, sounds=False).require()  # before an export, which takes a minute

    from mubic_deploy.training import evaluate as evaluation
    from mubic_deploy.training.clips import SOUNDS, Clips

    rows: list[dict[str, Any]] = []
    with predictor(arguments) as (model, warnings), ExitStack() as stack:
        warnings = said + warnings
        if model.config.has_audio:
            report = _check(videos, pictures=False)
            report.require()
            warnings += report.brief()
        elif arguments.sounds:
            raise UserError(f"the variant {model.config.variant} hears nothing: leave out --sounds")
        progress = stack.enter_context(bar("evaluating"))  # one bar at a time

        def clips(sound: str) -> Clips:
            return Clips(videos, model.config, stride=arguments.stride, fit=arguments.fit, sound=sound)

        keep = None if out is None else stack.enter_context(_maps_into(out))
        for sound in SOUNDS if arguments.sounds else ("own",):
            data = clips(sound)
            if not len(data):
                raise UserError(
                    f"no clip has a map at its middle: check the data folder with "
                    f"mubic-deploy train {arguments.data} --check"
                )
            result = evaluation.evaluate(
                model,
                data,
                steps=arguments.steps,
                seed=arguments.seed,
                negatives=arguments.negatives,
                keep=keep if sound == "own" else None,
                progress=lambda done, total, sound=sound: progress(f"evaluating, sound {sound}", done, total),  # type: ignore[misc]
            )
            rows.append({"what": f"sound {sound}", **_row(result)})
        skipped = sum(data.skipped.values())
        if arguments.baselines:
            for what, make in (("centre bias", evaluation.centre_bias), ("video's mean", evaluation.video_means)):
                progress(what, 0, 1)
                rows.append(
                    {"what": what, **_row(evaluation.evaluate_maps(make(data), data, negatives=arguments.negatives))}
                )
    if arguments.json:
        print_json(
            {
                "rows": rows,
                "videos": len(videos),
                "skipped": skipped,
                "negatives": arguments.negatives,
                "warnings": warnings,
            }
        )
        return 0
    warn(warnings)
    table = Table(title=f"{len(videos)} videos, {rows[0]['clips']} clips; {skipped} without a map are left out")
    table.add_column("", no_wrap=True, max_width=NAME_WIDTH)
    for heading in (*HEADINGS.values(), "steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        steps = f"{row['steps']:.2f}" if row["steps"] else ""
        table.add_row(row["what"], *(f"{row[k]:.4f}" for k in HEADINGS), steps)
        if len(row["datasets"]) > 1:
            for name, means in row["datasets"].items():
                table.add_row(f"  {name}", *(f"{means[k]:.4f}" for k in HEADINGS), "")
    screen.print(table)
    for row in rows:  # below: columns of any width would cut off the figures
        if undefined := ", ".join(f"{HEADINGS[k]} for {n}" for k, n in row["excluded"].items() if n):
            say(f"{row['what']}: undefined, so left out, are {undefined} of {row['clips']} clips")
    return 0


def pack(arguments: Namespace) -> int:
    """A checkpoint in FP16, half the size; its adaptive steps fitted anew if data are named."""
    from mubic_deploy import checkpoint
    from mubic_deploy.media.outputs import check_targets

    out: Path = arguments.out
    given = [name for name in FITTING if getattr(arguments, name) is not None]
    if given and arguments.data is None:
        raise UserError(f"--{given[0]} is for --fit-steps DATA: leave it out, or name the data")
    for name in FITTING.keys() - given:
        setattr(arguments, name, FITTING[name])
    check_targets({"weights": out}, {"weights": (".safetensors",)}, None)
    model, _ = checkpoint.load(str(arguments.checkpoint))
    if arguments.data is not None:
        _fit_packed(model, arguments)
    try:
        checkpoint.save(model, out, half=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): choose another file") from None
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _fit_packed(model: Any, arguments: Namespace) -> None:
    """The head of the adaptive steps goes by figures of the entropy that FP16 weights change a little."""
    from mubic_deploy.checkpoint import round_to_half
    from mubic_deploy.training.adaptive import fit_steps
    from mubic_deploy.training.clips import Clips

    if model.config.max_steps == 1:
        raise UserError(f"the variant {model.config.variant} takes one step: leave out --fit-steps")
    videos, said = _videos(arguments, "test")
    warn(said)
    clips = Clips(videos, model.config, stride=arguments.stride, fit=arguments.fit)
    round_to_half(model)
    with bar("fitting") as progress:
        fit_steps(
            model,
            clips,
            clips.spread(arguments.clips),
            progress=lambda done, n: progress("fitting adaptive steps", done, n),
        )


def _row(result: Any) -> dict[str, Any]:
    return {
        **result.means(),
        "clips": result.clips,
        "steps": result.mean_steps,
        "seconds": result.seconds,
        "excluded": result.excluded(),
        "datasets": {name: {**part.means(), "clips": part.clips} for name, part in result.by_dataset().items()},
        "videos": {name: {**part.means(), "clips": part.clips} for name, part in result.by_video().items()},
    }


@contextmanager
def _maps_into(out: Path) -> Iterator[Callable[[Any, Any], None]]:
    """What takes a ground truth and its predicted map, for the folder `out`: whole at the end, or not there."""
    from mubic_deploy.folders import replacing

    @contextmanager
    def written() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason, where = error.strerror or error, error.filename or out
            raise UserError(f"{where} cannot be written ({reason}): choose another --save-maps") from None

    def keep(truth: Any, saliency: Any) -> None:
        with written():
            write_map(folder, truth.video, truth.frame, saliency)

    with ExitStack() as stack:
        with written():
            folder = stack.enter_context(replacing(out))
        yield keep
        with written():
            stack.close()


def _videos(arguments: Namespace, *parts: str) -> tuple[list[Video], list[str]]:
    """The videos of these parts, of the data sets that were named or of all that are there, each once; and warnings."""
    root: Path = arguments.data
    present, said = _present(root, arguments.dataset)
    if arguments.dataset is None:  # the field's sets have all lists
        whole = [n for n in present if n in DATASETS or all(has_list(root, n, part, arguments.split) for part in parts)]
        if whole and (partial := ", ".join(name for name in present if name not in whole)):
            asked = " and ".join(parts)
            said = [*said, f"{partial} has no fold list for {asked} of split {arguments.split}: left out"]
            present = whole
    videos, again = once(v for part in parts for name in present for v in read_list(root, name, part, arguments.split))
    return videos, said + again


def _present(root: Path, named: list[str] | None) -> tuple[list[str], list[str]]:
    """The data sets that were named, or all of which there are frames; and a warning if others have fold lists.

    UserError if there is none, or if one that was named has lists and no frames. If one lacks the list that is asked
    for, `read_list` says so."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the one that holds video_frames, annotations and fold_lists")
    lists, frames = root / "fold_lists", root / "video_frames"
    there = datasets(root)
    listed = [name for name in named or there if name in there]
    shown = [name for name in named or [*dict.fromkeys([*DATASETS, *there])] if listing(frames / name)]
    missing = ", ".join(dict.fromkeys(n for n in listed if n not in shown))
    only_lists = f"{frames} holds nothing of {missing}, only fold lists are there"
    if missing and (named or not shown):
        raise UserError(f"{only_lists}: get the frames, or name what is there with --dataset")
    if named:
        return named, []
    if not shown:
        raise UserError(f"{lists} holds no list like AVAD_list_train_1_fps.txt: get the data sets' fold lists")
    return shown, [f"{only_lists}: left out"] if missing else []


def _check(videos: list[Video], deep: bool = False, **which: bool) -> CheckReport:
    with bar("checking") as progress:
        return check(videos, lambda done, total: progress("checking the data", done, total), deep, **which)


def _print_check(report: CheckReport, warnings: list[str], as_json: bool) -> int:
    """All that was found, a line a problem; exit code 2 if there is one."""
    warn(warnings)
    if as_json:
        figures = {name: vars(f) for name, f in report.datasets.items()}
        print_json({"datasets": figures, "problems": report.problems, "warnings": warnings})
    else:
        for name, f in report.datasets.items():
            say(f"{name}: {f.videos} videos, {f.frames} frames, {f.skipped} of them without a map")
        for problem in report.problems:
            say(problem)
        found = {"problem": len(report.problems), "warning": len(warnings)}
        counts = [f"{n} {what}{'s' * (n > 1)}" for what, n in found.items() if n]
        say(", ".join(counts) or "nothing is wrong")
    return 2 if report.problems else 0


def _settings(arguments: Namespace) -> Settings:
    """The run's settings if it goes on, else the recipe's; then what was said on the command line."""
    if arguments.resume:
        if arguments.out is None:
            raise UserError("there is no run to go on with: name it with --out, or leave out --resume")
        from mubic_deploy.training.state import STATE, load_state

        for name in ("recipe", "checkpoint", "visual", "vggish"):
            if getattr(arguments, name) is not None:
                raise UserError(f"a run goes on with the settings and weights that it has: leave out --{name}")
        base = load_state(arguments.out / STATE, tensors=False).settings
    else:
        base = RECIPES[arguments.recipe or "thesis"]
    given = {f.name: getattr(arguments, f.name) for f in fields(Settings)}
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _prepare(model: Any, arguments: Namespace, settings: Settings) -> None:
    """Pretrained weights into a fresh model, and a line each on stderr for what was matched."""
    from mubic_deploy import checkpoint
    from mubic_deploy.training.pretrained import load_vggish, load_visual

    said = []
    if arguments.checkpoint is not None:
        other, _ = checkpoint.load(arguments.checkpoint)
        # the fit may be another: weights of one learn the other
        if replace(other.config, fit=model.config.fit) != model.config:
            mine, theirs = (f"{c.name}/{c.variant}" for c in (model.config, other.config))
            raise UserError(f"{arguments.checkpoint} is of {theirs}, not {mine}: use its --config and --variant")
        model.load_state_dict(other.state_dict())
        said.append(f"all weights from {arguments.checkpoint}")
    if arguments.visual is not None:
        said.append(load_visual(model, arguments.visual).summary())
    if arguments.vggish is not None:
        if not model.config.has_audio:
            raise UserError("the variant visual_only has no VGGish: leave out --vggish")
        said.append(load_vggish(model, arguments.vggish).summary())
    for line in said:
        messages.print(line, markup=False, highlight=False, soft_wrap=True)
    if model.config.has_audio and settings.freeze_vggish and not (arguments.vggish or arguments.checkpoint):
        warn(["VGGish is frozen with random weights: give --vggish FILE, or train it with --no-freeze-vggish"])
