"""`firstlight sweep`: search for good settings, and tell whether they are better than those of the configuration."""

import gc
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from firstlight.callbacks import Pruning
from firstlight.callbacks.time_limit import parse_time
from firstlight.cli.arguments import without_time
from firstlight.cli.parser import CLI, OF_BATCHES
from firstlight.cli.parser_errors import read_yaml
from firstlight.cli.side_effects import isolated, without_side_effects
from firstlight.data import DataModule
from firstlight.errors import TrainingError, UsageError, check_range, emit, printing, say
from firstlight.insight import compare
from firstlight.loggers import as_list
from firstlight.run import directory
from firstlight.run.comparison import verdict
from firstlight.run.experiment import Experiment
from firstlight.run.resume import config_diff
from firstlight.run.sweep import result
from firstlight.run.sweep.space import Space, default_space, parse_space
from firstlight.run.sweep.study import State, Study

_WORKER = "FIRSTLIGHT_SWEEP_WORKER"
"""Set in the processes of `--jobs`: the index of the process."""


class Sweep:
    """A sweep: the command line of its configuration, its space and its study.

    Args:
        args: Arguments of the command.

    Raises:
        UsageError: When options, space or configuration cannot be right.
    """

    def __init__(self, args: list[str]) -> None:
        self.started = time.time()
        args, limit = without_time(args)
        self.cli = CLI("sweep", args)
        config, experiment = self.cli.config, self.cli.training()
        if self.cli.run_dir is not None or config.resume:
            raise UsageError("sweep starts runs of its own: leave out --run and --resume; the same command continues")
        if experiment.monitored is None:
            raise UsageError("sweep needs a metric that decides what is better: give --monitor NAME and --mode")
        if "best" in experiment.disable or experiment.options["fast_dev_run"]:
            raise UsageError("sweep compares best checkpoints, but none will be written: enable best")
        if (processes := experiment.trainer(logger=False).world_size) > 1:
            raise UsageError(f"a trial is trained in one process, but the trainer has {processes}: use --jobs")
        if limit is not None and config.trials:
            raise UsageError("--time and --trials exclude each other")
        self.monitor, self.mode = experiment.monitored.monitor, experiment.monitored.mode
        self.seeds = 6 if config.seeds is None else config.seeds
        self.jobs = 1 if config.jobs is None else config.jobs
        self.trials = 10**6 if limit is not None else 40 if config.trials is None else config.trials
        check_range("sweep", "[1, inf)", jobs=self.jobs, trials=self.trials)
        if self.seeds:
            check_range("sweep", "[2, inf)", seeds=self.seeds)
        self.deadline = None if limit is None else self.started + parse_time(limit)
        self.own = self.cli.options()
        self.space = self._space()
        self.folder = self.cli.experiment_dir
        # Options of the data, and a module that has loaded them.
        self._shared: tuple[dict[str, Any], Any] = {}, experiment.datamodule

    def _space(self) -> Space:
        """Return the space, whose ends the parts have taken."""
        if self.cli.config.space is None:
            data = self.cli.experiment.datamodule
            samples = None
            if isinstance(data, DataModule):
                data.setup("fit")
                samples = len(data.indices["train"])
            space = default_space(self.own, samples)
            if not space:
                raise UsageError("the configuration has no option of the default space: give --space FILE")
            return space
        path = Path(self.cli.config.space).expanduser()
        space = parse_space(read_yaml(path), str(path))
        for name, parameter in space.items():
            if parameter.when:
                continue  # Only some values of other options have it.
            for value in parameter.ends():
                try:
                    with isolated():
                        self.cli.variant({name: value})
                except UsageError as error:
                    raise UsageError(f"{path}: {name}={value}: {error}") from error
        return space

    def asked(self) -> dict[str, Any]:
        """Return what identifies the sweep."""
        options = {name: value for name, value in self.own.items() if name not in ("seed_everything", "seeds")}
        return {"configuration": options, "space": {name: vars(each) for name, each in self.space.items()}}

    def study(self, worker: int = 0) -> Study:
        """Return the study, with this process as a worker."""
        seed = self.cli.seed + 1000 * worker
        return Study(self.folder, self.cli.config.storage, self.mode, self.asked(), seed)

    def work(self, study: Study) -> None:
        """Train trials until all are given out, or the time is over."""
        gc.collect()
        gc.freeze()  # So that the collection after each trial takes 10 ms instead of 290.
        while self.deadline is None or time.time() < self.deadline:
            given = study.next(self.space, self.own, self.trials)
            if given is None:
                break
            trial, values = given
            self._train(study, trial.number, values, trial.user_attrs.get("run"))

    def _train(self, study: Study, number: int, values: Mapping[str, Any], run: str | None) -> None:
        """Train a trial, or continue one that was killed, and tell how it went."""
        started = time.time()
        state: State
        notes: dict[str, Any] = {"values": dict(values)}
        pruning = Pruning(study.storage, study.name, number, self.monitor, self.mode, self.deadline)
        try:
            with isolated(), printing("silent"):
                experiment = self.experiment(values, pruning)
                if run and (Path(run) / "checkpoints" / "last.ckpt").is_file():
                    experiment = replace(experiment, run_dir=Path(run))
                results = experiment.fit()
                assert experiment.run_dir is not None
                if results is None:
                    results = directory.read_results(experiment.run_dir)
                else:
                    experiment.write_results(results)
            value = results["best"].get(self.monitor, math.nan)
            notes |= {"run": str(experiment.run_dir), "steps": results["steps"], "value": value}
            state = "pruned" if pruning.is_pruned or not math.isfinite(value) else "complete"
        except TrainingError as error:  # For example a loss that is not finite: worse than any number.
            state = "pruned"
            notes["error"] = str(error).splitlines()[0]
        except Exception as error:
            state = "failed"
            notes["error"] = (str(error).splitlines() or [type(error).__name__])[0]
            if not isinstance(error, UsageError | torch.OutOfMemoryError):
                study.end(number, state, notes)  # Otherwise each later command would get this trial again.
                raise
        if state == "failed":
            gc.collect()  # The exception kept the tensors of the trial alive.
        notes["seconds"] = round(time.time() - started, 2)
        study.end(number, state, notes)
        say(result.trial_line(number, state, self.monitor, notes))
        emit("trial", number=number, state=state, **notes)

    def experiment(self, values: Mapping[str, Any], pruning: Pruning | None = None) -> Experiment:
        """Return the experiment of a trial, which shares the loaded data with the others where it can."""
        experiment = self.cli.variant(values)
        experiment.reads_test = False
        if pruning is not None:
            callbacks = [*as_list(experiment.options["callbacks"]), pruning]
            experiment.options = {**experiment.options, "callbacks": callbacks}
        data = experiment.datamodule
        if isinstance(data, DataModule):
            options = {
                name: value for name, value in values.items() if name.startswith("data") and name not in OF_BATCHES
            }
            if self._shared[0] == options:
                data.share(self._shared[1])
            else:
                self._shared = options, data
        return experiment


@without_side_effects()
def sweep(args: list[str]) -> None:
    """Search for good settings; then train the best and the own ones with several seeds, and compare them."""
    found = Sweep(args)
    index = os.environ.get(_WORKER)
    study = found.study(0 if index is None else int(index))
    try:
        if index is not None:
            found.work(study)
            return
        emit("start", verb="sweep", run=str(found.folder), trials=found.trials if found.deadline is None else None)
        result.say_space(found.space, found.own, found.folder, found.trials if found.deadline is None else None)
        if found.jobs == 1:
            found.work(study)
        else:
            _work_together(args, found.jobs)
            found.work(study)  # What a killed process has left.
        if study.best is None:
            raise TrainingError(f"no trial of {found.folder} is complete: see their lines")
        directory.refuse_mixed_data(Path(run) for each in study.trials if (run := each.user_attrs.get("run")))
        best = result.write_best(study, found.folder)
        result.say_result(study, found.monitor, found.folder)
        verdicts = _compare(found, study, best) if found.seeds else []
        say(f"report {result.write_report(study, found.monitor, found.folder, verdicts)}")
        emit("end", verb="sweep", best=str(best), trials=len(study.trials), verdicts=verdicts)
    except (KeyboardInterrupt, SystemExit):
        say("sweep interrupted; continue with the same command", always=True)
        raise
    finally:
        gc.unfreeze()
        study.close()


def _compare(found: Sweep, study: Study, best: Path) -> list[str]:
    """Train the best and the own configuration with several seeds, and return what their difference shows."""
    assert study.best is not None
    chosen = study.best.user_attrs["values"]
    differs = {name: value for name, value in chosen.items() if value != found.own.get(name)}
    if not differs:
        text = "the configuration itself is the best one: nothing to compare"
        say(f"gain   {text}", always=True)
        return [text]
    first = found.cli.seed + 1  # The search has used the seed itself.
    sets: list[tuple[str, dict[str, Any]]] = [("start", {}), ("best", chosen)]
    runs = [Path(study.best.user_attrs["run"])]
    sides = [
        [_value(found, name, values, first + index, runs) for index in range(found.seeds)] for name, values in sets
    ]
    directory.refuse_mixed_data(runs)
    pairs = np.array([pair for pair in zip(*sides, strict=True) if np.isfinite(pair).all()]).reshape(-1, 2)
    verdicts = []
    if lost := found.seeds - len(pairs):
        verdicts.append(f"{lost} of {found.seeds} seeds are left out, because a run with them failed")
    if len(pairs) > 1:
        metric = found.monitor.partition("/")[2] or found.monitor
        difference = compare.difference_of_groups(pairs[:, 0], pairs[:, 1], is_paired=True)
        verdicts.insert(0, verdict("the configuration", "the best trial", metric, difference))
    for each in verdicts:
        say(f"gain   {each}", always=True)
    return verdicts


def _value(found: Sweep, name: str, values: Mapping[str, Any], seed: int, runs: list[Path]) -> float:
    """Return the best value of a configuration with a seed, NaN if its run fails; it is trained if it was not.

    Its run is added to `runs`.
    """
    folder = found.folder.with_name(f"{found.folder.name}_{name}")
    say(f"gain   {name} configuration, seed {seed}")
    try:
        with isolated(), printing("silent"):
            experiment = found.experiment({**values, "seed_everything": seed})
            experiment.experiment_dir = folder
            finished = [run for run in directory.started_runs(folder) if directory.is_finished(run)]
            run = next((each for each in finished if _has_config(each, experiment.config)), None)
            if run is None:
                results = experiment.fit()
                assert results is not None
                experiment.write_results(results)
            else:
                results = directory.read_results(run)
            runs += [each for each in (run or experiment.run_dir,) if each]
    except (TrainingError, UsageError, torch.OutOfMemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say(f"gain   {name} configuration, seed {seed} failed: {reason}", always=True)
        return math.nan
    return float(results["best"].get(found.monitor, math.nan))


def _has_config(run: Path, config: str) -> bool:
    """Return whether a run was trained with a configuration."""
    return not config_diff(directory.load_config(run), yaml.safe_load(config))


def _work_together(args: list[str], jobs: int) -> None:
    """Start processes that work on the study, each with its own device, and wait for them."""
    devices = torch.cuda.device_count()
    processes = []
    for index in range(jobs):
        environment = {**os.environ, _WORKER: str(index + 1)}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = str(index % devices)
        command = [sys.executable, "-m", "firstlight", "sweep", *args]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        codes = [each.wait() for each in processes]
    except BaseException:
        for each in processes:
            each.terminate()
        for each in processes:
            each.wait()
        raise
    for index, code in enumerate(codes):
        if code:
            trial = "has failed" if code == 1 else "is resumed"
            say(f"sweep  process {index + 1} of {jobs} ended with exit code {code}; its trial {trial}", always=True)
