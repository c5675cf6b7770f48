"""Trains a DINOv2 model: `python -m dinov2_jax.train --config=configs/quickstart.py`.

The door: reads the flags and the configuration, builds the rooms, and opens them to the loop. Run
the same command again to go on from the last checkpoint. Exit codes: 0 finished (or before), 1
stopped by a guard, a full disk, a store out of reach or hosts that did not come, 2 wrong config,
data or workdir, or too little memory on a device, 143 and 130 saved and stopped after SIGTERM and
SIGINT (a second: without saving).
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath
from jax.sharding import Mesh

from dinov2_jax import compiler, distributed, faults, inputs, preview, report, startup, workload
from dinov2_jax import config as config_lib
from dinov2_jax import metrics as metrics_lib
from dinov2_jax.checkpoints import Checkpoints, KeepPolicy
from dinov2_jax.commands import WRONG_INPUT, end_all, fail, known_end
from dinov2_jax.config_rules import ConfigError
from dinov2_jax.convert.spec import METADATA_KEY, SPEC_FILE, ModelSpec
from dinov2_jax.data.records import DataError
from dinov2_jax.exchange import Exchange
from dinov2_jax.feed import Feed
from dinov2_jax.flags import parse_flags
from dinov2_jax.goodput import Goodput
from dinov2_jax.guards import NONFINITE_FOLDER, StopRun
from dinov2_jax.loop import Limits, Loop, new_books
from dinov2_jax.preemption import watch_notices
from dinov2_jax.progress import Display, format_secs
from dinov2_jax.rhythm import Rhythm
from dinov2_jax.signals import StopSignals
from dinov2_jax.startup_table import describe
from dinov2_jax.storage import write_whole
from dinov2_jax.teacher_file import teacher_writer
from dinov2_jax.workdir import (
    BAD_IMAGES_FILE,
    CONFIG_FILE,
    WorkdirError,
    check_shared,
    check_unchanged,
    clear_leftovers,
    open_workdir,
    workdir_path,
)

STOPPED = 1
CROPS_FILE, PATCHES_FILE = "crops.png", "pca.png"
LEFTOVERS = (CROPS_FILE, PATCHES_FILE, BAD_IMAGES_FILE, NONFINITE_FOLDER)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what is wrong with its input is one line on stderr. Returns the code."""
    workdir = None
    try:
        flags = parse_flags(sys.argv[1:] if argv is None else argv)
        config = config_lib.load_config(flags.config, flags.overrides)
        workdir = workdir_path(flags.workdir or f"runs/{epath.Path(flags.config).stem}")
        compiler.use_compilation_cache()
        distributed.initialize(flags.distributed)
        with StopSignals() as signals, watch_notices(signals.notice):
            if flags.dry_run or flags.suggest:
                preview.show(config, flags, workdir)
                return 0
            with contextlib.ExitStack() as stack:
                distributed.on_primary(lambda: stack.enter_context(open_workdir(workdir)))
                return train(config, flags, workdir, signals)
    except (StopRun, distributed.LostHostError, faults.PassingFault) as error:
        return fail(error, STOPPED)
    except (ConfigError, DataError, WorkdirError, distributed.HostError) as error:
        return fail(error, WRONG_INPUT)
    except Exception as error:
        end_all(error, workdir=workdir)
        known = known_end(error, workdir=workdir)
        if known is None:
            raise
        return fail(*known)


def train(config, flags: argparse.Namespace, workdir: epath.Path, signals: StopSignals) -> int:
    """Starts or resumes the run of a workdir; returns the exit code. Every process calls it."""
    is_primary = distributed.is_primary()
    tell = functools.partial(print, flush=True)
    say = tell if is_primary else lambda *_: None
    goodput = Goodput()
    distributed.check_same("configuration", config_lib.to_json(config))
    check_shared(workdir)
    keep = KeepPolicy(
        last=config.checkpoints.keep_last, every_steps=config.checkpoints.keep_every_steps
    )
    with contextlib.ExitStack() as stack:
        end = functools.partial(end_all, workdir=workdir)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep, on_failure=end)
        )
        if checkpoints.steps():
            check_unchanged(workdir, config, allow=flags.allow_config_change, say=say)
            if checkpoints.steps()[-1] >= config.total_steps:
                say(f"{workdir}: this run is finished, all {config.total_steps} steps are done")
                return 0
        else:
            distributed.on_primary(lambda: clear_leftovers(workdir, LEFTOVERS))
        source = distributed.together(lambda: inputs.open_data(config))
        say(source.describe())
        rejected = [name for name, _ in source.rejected]
        distributed.check_same("set of images", f"{len(source)} but for {rejected}")
        bad_images = distributed.together(
            lambda: inputs.build_bad_images(config, source, workdir, is_writer=is_primary)
        )
        stack.callback(bad_images.flush)
        mesh = startup.build_mesh(config)
        stack.enter_context(jax.set_mesh(mesh))
        trainer = startup.build_trainer(config, mesh)
        evaluation = distributed.together(lambda: inputs.build_evaluation(config, trainer))
        say(
            describe(
                config, trainer, config_path=flags.config, workdir=workdir, num_images=len(source)
            )
        )
        if evaluation is not None:
            say(evaluation.describe())
            distributed.check_same("evaluation", evaluation.describe())
        for line in preview.warnings(config, trainer, num_images=len(source)):
            say(line)
        try:
            restored = checkpoints.restore_latest(trainer.abstract_state, warn=tell)
        except ValueError as error:
            raise WorkdirError(
                f"{error}; if the model was changed, set its keys back as {workdir / CONFIG_FILE} "
                "has them, or choose another --workdir"
            ) from error
        spec = describe_model(config, trainer)
        # Only now: a run that could not be restored must keep the configuration it was made with.
        distributed.on_primary(lambda: write_records(config, workdir, mesh, spec))
        step, state, books = restored or (0, trainer.init(), new_books())
        goodput.carry(books.get("secs", {}), metrics_lib.lines_left(workdir) if is_primary else [])
        restored_step = step if restored else None
        rhythm = build_rhythm(config)
        if restored:
            say(f"resumed from step {step}")
        if rhythm.misses_profile(step):
            say(
                f"warning: profile_steps={config.profile_steps} begins before step {step}, where "
                "this run goes on: it writes no trace; give steps to come"
            )
        feed = Feed(
            stack.enter_context(inputs.open_batches(config, source, mesh, start_step=step)),
            mesh,
            num_groups=config.global_batch_size // config.group_size,
        )

        def open_writer() -> metrics_lib.MetricsWriter:
            if config.pictures and not (workdir / CROPS_FILE).exists():
                inputs.draw_crops(config, feed.peek().host, workdir / CROPS_FILE)
            return metrics_lib.MetricsWriter(
                workdir,
                restored_step=restored_step,
                evaluated_step=books["evaluated_step"],
                tensorboard=config.tensorboard,
                wandb_project=config.wandb_project,
                config=config.to_dict(),
            )

        writer = stack.enter_context(distributed.on_primary(open_writer) or metrics_lib.NoWriter())
        loop = Loop(
            workdir=workdir,
            state=state,
            step=step,
            books=books,
            train_step=compile_step(trainer, state, feed, step, goodput=goodput, say=say),
            schedules=trainer.schedules,
            feed=feed,
            images_per_step=config.global_batch_size,
            speed=workload.measure(config, trainer),
            goodput=goodput,
            rhythm=rhythm,
            limits=Limits(
                max_nonfinite_steps=config.guards.max_nonfinite_steps,
                check_collapse=config.guards.collapse_check,
                warmup_steps=config.optim.warmup_steps,
            ),
            checkpoints=checkpoints,
            writer=writer,
            display=stack.enter_context(
                Display(total=config.total_steps, done=step, is_shown=is_primary)
            ),
            bad_images=bad_images,
            evaluate=inputs.evaluate_with_baselines(evaluation),
            evaluation=json.dumps(config.eval.to_dict()),
            best_metric=f"knn/{inputs.evaluation_name(config)}/cls",
            keep_best=config.checkpoints.keep_best,
            write_teacher=teacher_writer(
                workdir,
                {"config": json.dumps(config.to_dict()), METADATA_KEY: spec.to_json()},
            ),
            exchange=Exchange(mesh, signals),
        )
        del state, restored  # the loop donates the state
        for line in writer.lines():
            loop.last_evaluation |= {key: x for key, x in line.items() if key.startswith("knn/")}
        distributed.meet()
        if not loop.run():
            save_last(loop)
            done = f"{'and saved ' if loop.step else ''}after step {loop.step}"
            loop.display.line(f"stopped {done}; the same command goes on from there")
            return 128 + loop.exchange.stop
        finish(config, loop, trainer, source)
        return 0


def describe_model(config, trainer: startup.Trainer) -> ModelSpec:
    """The backbone's record, which goes with its weights."""
    return ModelSpec.from_module(
        trainer.network.backbone,
        mean=tuple(config.augment.mean),
        std=tuple(config.augment.std),
        resize_size_px=config.eval.resize_size_px,
        crop_size_px=config.eval.crop_size_px,
    )


def write_records(config, workdir: epath.Path, mesh: Mesh, spec: ModelSpec) -> None:
    """Writes what the run is: config.json, model.json, and this start in environment.json."""
    write_whole(workdir / CONFIG_FILE, config_lib.to_json(config))
    write_whole(workdir / SPEC_FILE, spec.to_json())
    devices = list(mesh.devices.flat)
    environment = metrics_lib.describe_environment(devices, repository=config_lib.REPOSITORY)
    metrics_lib.add_environment(workdir, environment)


def compile_step(
    trainer: startup.Trainer, state, feed: Feed, step: int, *, goodput: Goodput, say: Callable
):
    """Compiles the train step for the batches of this run, and says how long that took."""
    batch = feed.peek().device
    started = time.perf_counter()
    with goodput.spent_on("compile"):
        compiled = trainer.train_step.lower(state, batch, trainer.schedules.at(step)).compile()
    text = f"compiled the step in {format_secs(time.perf_counter() - started)}"
    memory = compiled.memory_analysis()
    if memory is not None:
        text += f"; it needs {report.megabytes(memory.temp_size_in_bytes)} beside the state"
    say(text)
    return compiled


def build_rhythm(config) -> Rhythm:
    """When things happen."""
    first, _, last = config.profile_steps.partition(":")
    return Rhythm(
        total=config.total_steps,
        log=config.log_every_steps,
        checkpoint=config.checkpoint_every_steps,
        evaluate=config.eval_every_steps,
        teacher=config.teacher_every_steps,
        profile=(int(first), int(last)) if first else None,
    )


def save_last(loop: Loop) -> None:
    """Saves, waits until it is written, and says where the time went."""
    loop.save()
    with loop.goodput.spent_on("checkpoint"):
        loop.checkpoints.wait()
    loop.display.line(loop.goodput.describe())


def finish(config, loop: Loop, trainer: startup.Trainer, source) -> None:
    """Draws, saves the last checkpoint, and says what lies where and what to try next."""
    if config.pictures:
        try:
            with loop.goodput.spent_on("evaluate"):
                inputs.draw_patches(
                    config, trainer, source, loop.state.teacher, loop.workdir / PATCHES_FILE
                )
        # A picture is not worth a run: whatever goes wrong, the network is saved.
        except Exception as error:
            loop.display.line(f"warning: {PATCHES_FILE} could not be drawn ({error})")
    save_last(loop)
    for line in report.last_words(
        workdir=loop.workdir,
        metrics=loop.last_evaluation,
        name=inputs.evaluation_name(config),
        is_own_data=not config.data.path.startswith("photos:"),
    ):
        loop.display.line(line)


if __name__ == "__main__":
    sys.exit(main())
