r"""Trains configs x seeds x overrides as one Slurm job array, and tables what came out.

    python launch/sweep.py --configs=configs/pairs.py:aux_10,configs/pairs.py:shared \
      --seeds=0,1,2 --override=optimizer.learning_rate=0.1,0.01 --workdir=runs/sweep \
      --partition=gpu
    python launch/sweep.py …the same… --collect

Every combination has a directory of its own in the workdir and is checked before any is submitted.
The same command again, once its jobs have left the queue, submits those that are not done. Needs
``pip install 'sire_jax[sweep]'``, but not with --local, --dry_run and --collect. PYTHON in the
environment is what runs the program.
"""

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sire_jax import configuration, registry, text
from sire_jax.configuration import experiment
from sire_jax.job import command
from sire_jax.storage.workdir import Workdir, at, read_results

_HERE = Path(__file__).parent
# What ends a job of launch/slurm.sbatch ends those of a sweep, too.
_ENDING = "# ---- What its end means"
_LONGEST = 200


class SweepError(Exception):
    """A sweep that can't be; the message says why."""


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        config: ``configs/X.py:variant``.
        overrides: ``key=value`` each.
        seed: The seed of its only run; ``None`` for those of the config.
        path: Its workdir.
    """

    config: str
    overrides: tuple[str, ...]
    seed: int | None
    path: Path

    @property
    def name(self) -> str:
        """What it is called, but for the seed: config and overrides."""
        return _name(self.config, self.overrides)

    def arguments(self) -> list[str]:
        """Returns the training program's arguments."""
        return [f"--config={self.config}", f"--workdir={self.path}", *self.config_overrides()]

    def config_overrides(self) -> list[str]:
        """Returns its overrides as the command line has them."""
        seeds = [] if self.seed is None else [f"seed={self.seed}", "seeds=1"]
        return [f"--config.{override}" for override in (*seeds, *self.overrides)]


def _name(config: str, overrides: Sequence[str]) -> str:
    """Makes a name that is readable and can be a directory's."""
    file, _, variant = config.partition(":")
    parts = [f"{Path(file).stem}:{variant}" if variant else Path(file).stem, *overrides]
    return re.sub(r"[^\w.:=,+-]+", "_", "-".join(parts)).replace(":", "_")


def split(text: str) -> list[str]:
    """Splits a list at its commas, but not inside of brackets or quotes.

    Args:
        text: Such as ``0.1,(1,2)``.

    Returns:
        Its values, such as ``["0.1", "(1,2)"]``.
    """
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return values


def split_configs(text: str) -> list[str]:
    """Splits a list of configs at its commas; a variant may have some: ``a.py:b,c,a.py:d``."""
    configs: list[str] = []
    for part in text.split(","):
        if configs and ".py" not in part:
            configs[-1] += f",{part}"
        else:
            configs.append(part)
    return configs


def combinations(
    configs: Sequence[str],
    seeds: Sequence[int | None],
    overrides: Sequence[str],
    workdir: str | Path,
) -> list[Combination]:
    """Lists the runs of a sweep, those of one seed after the other.

    Args:
        configs: ``configs/X.py:variant`` each.
        seeds: Seeds; ``[None]`` for those of the configs.
        overrides: ``key=value,value,…`` each; all choices of values are combined.
        workdir: The directory of theirs.

    Returns:
        The combinations.

    Raises:
        SweepError: If an override has no value, or two combinations are the same, or one has a name
            that is too long for a directory.
    """
    choices = []
    for override in overrides:
        key, equals, values = override.partition("=")
        if not equals or not key:
            raise SweepError(f"--override={override} should be --override=key=value,value,…")
        choices.append([f"{key}={value}" for value in split(values)])
    runs = []
    for config, *settings in itertools.product(configs, *choices):
        for seed in seeds:
            name = _name(config, settings) + ("" if seed is None else f"-seed={seed}")
            runs.append(Combination(config, tuple(settings), seed, at(workdir) / name))
    paths = [run.path for run in runs]
    twice = sorted({path.name for path in paths if paths.count(path) > 1})
    if twice:
        raise SweepError(f"Combinations are there twice: {', '.join(twice)}.")
    longest = max((path.name for path in paths), key=len)
    if len(longest) > _LONGEST:
        raise SweepError(
            f"{longest} is too long for the name of a directory ({len(longest)} characters; at most"
            f" {_LONGEST}). Put overrides with only one value into a config file."
        )
    return runs


def check(runs: Sequence[Combination]) -> None:
    """Checks all combinations, as the training program would; nothing is compiled.

    Raises:
        ValueError: If a config or a workdir doesn't fit; which, is printed.
        FileNotFoundError: If there is no such config file.
    """
    built = set()
    for run in tqdm(runs, desc="checking", disable=not sys.stderr.isatty(), leave=False):
        try:
            config = configuration.load(run.config, run.config_overrides())
            # Of those that differ in their seeds, one shows whether the parts fit.
            if run.name not in built:
                experiment.build(config)
            # What is not there is not made by a check.
            if (run.path / "config.json").exists():
                Workdir(run.path, config)
        except Exception:
            print(f"In {run.path.name}:", file=sys.stderr, flush=True)
            raise
        built.add(run.name)


def submit(
    runs: Sequence[Combination],
    folder: Path,
    options: Mapping[str, Any],
    further: Mapping[str, str],
) -> list[str]:
    """Submits a job array, an element for each combination.

    Args:
        runs: Combinations.
        folder: Where the jobs' logs are written.
        options: Parameters of submitit's Slurm executor.
        further: Options of sbatch that it has no parameters for.

    Returns:
        The number of each job.

    Raises:
        SweepError: If submitit or Slurm is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise SweepError("A sweep needs submitit: pip install 'sire_jax[sweep]'.") from error
    try:
        executor = submitit.SlurmExecutor(folder=folder)
    except RuntimeError as error:
        raise SweepError("There is no Slurm here (no srun); --local runs it here.") from error
    _, _, ending = (_HERE / "slurm.sbatch").read_text().partition(_ENDING)
    executor.update_parameters(
        # The program saves and ends with 85 at USR1, as at TERM; the batch script doesn't get it.
        **options,
        additional_parameters={"signal": "USR1@60", "requeue": True, **further},
        srun_args=["--kill-on-bad-exit=0", "--wait=60"],
        teardown=ending.splitlines()[1:],
    )
    # The job becomes the program: its signals and its exit status are those of the contract.
    python = os.environ.get("PYTHON", sys.executable)
    lines = [[python, "-m", "sire_jax.train", *run.arguments()] for run in runs]
    with executor.batch():
        jobs = [executor.submit(os.execvp, python, line) for line in lines]
    return [job.job_id for job in jobs]


def run_here(runs: Sequence[Combination]) -> list[str]:
    """Runs combinations on this machine, one after the other, until one is interrupted.

    Args:
        runs: Combinations.

    Returns:
        How each ended.
    """
    states = ["not started"] * len(runs)
    for i, run in enumerate(tqdm(runs, desc="runs", disable=not sys.stderr.isatty())):
        print(f"{run.path}", flush=True)
        local = [str(_HERE / "local.sh"), *run.arguments()]
        status = _passing_signals(local, {"PYTHON": sys.executable, **os.environ})
        states[i] = "done" if status == 0 else f"ended with status {status}"
        if status in (command.INTERRUPTED, command.AGAIN):
            break
    return states


def _passing_signals(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command and returns its exit status; signals reach it as well as this process."""
    # In a session of its own, or a Ctrl-C of the terminal would reach it twice.
    process = subprocess.Popen(line, env=environment, start_new_session=True)
    handlers = {
        number: signal.signal(number, lambda number, frame: process.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        return process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def collect(runs: Sequence[Combination], split: str, metrics: Sequence[str]) -> str:
    """Tables the results, a line for each config and overrides: mean ± deviation over seeds.

    Args:
        runs: Combinations.
        split: Such as ``test``.
        metrics: Names such as ``main/top_1``; none for the accuracies of all outputs.

    Returns:
        The table.

    Raises:
        SweepError: If no run has ended, or none has such a split.
        ValueError: If none has such a metric.
    """
    results = {run: read_results(run.path) for run in runs}
    splits = {run: content["splits"] for run, content in results.items() if content is not None}
    if not splits:
        raise SweepError(f"None of the {len(runs)} runs has ended.")
    measured = dict.fromkeys(name for of_run in splits.values() for name in of_run.get(split, ()))
    if not measured:
        names = sorted({name for of_run in splits.values() for name in of_run})
        raise SweepError(f"No run has measured '{split}'; there is {', '.join(names)}.")
    for metric in metrics:
        registry.choose(measured, metric, "metric")
    accuracies = [name for name in measured if name.endswith("/top_1")]
    columns = list(metrics) or accuracies or list(measured)
    rows = [["run", "ended", *(f"{split} {metric}" for metric in columns)]]
    for name, group in itertools.groupby(runs, key=lambda run: run.name):
        members = list(group)
        ended = [splits[run].get(split, {}) for run in members if run in splits]
        values = ([v for of_run in ended for v in of_run.get(metric, ())] for metric in columns)
        rows.append([name, f"{len(ended)} of {len(members)}", *map(_spread, values)])
    return text.align(rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, deviation = text.spread(values)
    spread = f" ± {text.number(deviation)}" if len(values) > 1 else ""
    return f"{text.number(mean)}{spread} ({len(values)})"


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--configs", required=True, help="configs/X.py:variant,configs/…")
    seeds = "0,1,2: a run each; without, those of configs"
    parser.add_argument("--seeds", default=[None], type=_integers, help=seeds)
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE,…",
        help="values to try of a key of the config; several of these are combined",
    )
    parser.add_argument("--workdir", required=True, help="directory of the runs' workdirs")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="check, and show what would be run")
    mode.add_argument("--local", action="store_true", help="one after the other, on this machine")
    mode.add_argument("--collect", action="store_true", help="show the results")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--partition")
    slurm.add_argument("--minutes", type=int, default=1440, help="time limit; then it goes on")
    slurm.add_argument("--nodes", type=int, default=1)
    slurm.add_argument("--tasks_per_node", type=int, default=1, help="processes of one run")
    slurm.add_argument("--gpus_per_node", type=int)
    slurm.add_argument("--cpus_per_task", type=int, default=2)
    slurm.add_argument("--at_once", type=int, default=256, help="so many jobs run at a time")
    slurm.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch, such as mem=32G",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--split", default="test")
    results.add_argument("--metrics", default="", help="main/top_1,…; accuracies if none")
    return parser


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _options(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the parameters of submitit's executor."""
    own = ("partition", "nodes", "gpus_per_node", "cpus_per_task")
    options = {
        "job_name": "sire_jax",
        "time": flags.minutes,
        "array_parallelism": flags.at_once,
        "ntasks_per_node": flags.tasks_per_node,
        "stderr_to_stdout": True,
        **{key: getattr(flags, key) for key in own},
    }
    # What is left out is the cluster's own choice.
    return {key: value for key, value in options.items() if value is not None}


def _further(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not pair.partition("=")[2]:
            raise SweepError(f"--slurm={pair} should be --slurm=key=value.")
    return dict(pair.split("=", 1) for pair in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    flags = _parser().parse_args(arguments)
    try:
        with command.readable_errors(goes_on=True):
            print(_sweep(flags))
    except SweepError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        sys.exit(command.EXPLAINED)


def _sweep(flags: argparse.Namespace) -> str:
    """Does what was asked for and returns the table that shows it."""
    runs = combinations(split_configs(flags.configs), flags.seeds, flags.override, flags.workdir)
    if flags.collect:
        return collect(runs, flags.split, flags.metrics.split(",") if flags.metrics else [])
    further = _further(flags.slurm)
    check(runs)
    states = {run: "done" if read_results(run.path) else "to run" for run in runs}
    todo = [run for run in runs if states[run] != "done"]
    if flags.local:
        states |= zip(todo, run_here(todo), strict=True)
    elif todo and not flags.dry_run:
        jobs = submit(todo, at(flags.workdir) / "jobs" / "%j", _options(flags), further)
        states |= zip(todo, [f"job {job}" for job in jobs], strict=True)
    rows = ([str(run.path), state] for run, state in states.items())
    return text.align([["workdir", "state"], *rows])


if __name__ == "__main__":
    main()
