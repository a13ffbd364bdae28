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
        return [f"--config.{each}" for each in (*seeds, *self.overrides)]


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
    for each in overrides:
        key, equals, values = each.partition("=")
        if not equals or not key:
            raise SweepError(f"--override={each} should be --override=key=value,value,…")
        choices.append([f"{key}={value}" for value in split(values)])
    found = []
    for config, *chosen in itertools.product(configs, *choices):
        for seed in seeds:
            name = _name(config, chosen) + ("" if seed is None else f"-seed={seed}")
            found.append(Combination(config, tuple(chosen), seed, at(workdir) / name))
    paths = [each.path for each in found]
    twice = sorted({path.name for path in paths if paths.count(path) > 1})
    if twice:
        raise SweepError(f"Combinations are there twice: {', '.join(twice)}.")
    longest = max((path.name for path in paths), key=len)
    if len(longest) > _LONGEST:
        raise SweepError(
            f"{longest} is too long for the name of a directory ({len(longest)} characters; at most"
            f" {_LONGEST}). Put overrides with only one value into a config file."
        )
    return found


def check(found: Sequence[Combination]) -> None:
    """Checks all combinations, as the training program would; nothing is compiled.

    Raises:
        ValueError: If a config or a workdir doesn't fit; which, is printed.
        FileNotFoundError: If there is no such config file.
    """
    built = set()
    for each in tqdm(found, desc="checking", disable=not sys.stderr.isatty(), leave=False):
        try:
            config = configuration.load(each.config, each.config_overrides())
            # Of those that differ in their seeds, one shows whether the parts fit.
            if each.name not in built:
                experiment.build(config)
            if (each.path / "config.json").exists():
                Workdir(each.path, config)
        except Exception:
            print(f"In {each.path.name}:", file=sys.stderr, flush=True)
            raise
        built.add(each.name)


def submit(
    found: Sequence[Combination],
    folder: Path,
    options: Mapping[str, Any],
    further: Mapping[str, str],
) -> list[str]:
    """Submits a job array, an element for each combination.

    Args:
        found: Combinations.
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
    lines = [[python, "-m", "sire_jax.train", *each.arguments()] for each in found]
    with executor.batch():
        jobs = [executor.submit(os.execvp, python, line) for line in lines]
    return [job.job_id for job in jobs]


def run_here(found: Sequence[Combination]) -> list[str]:
    """Runs combinations on this machine, one after the other, until one is interrupted.

    Args:
        found: Combinations.

    Returns:
        How each ended.
    """
    states = ["not started"] * len(found)
    for i, each in enumerate(tqdm(found, desc="runs", disable=not sys.stderr.isatty())):
        print(f"{each.path}", flush=True)
        local = [str(_HERE / "local.sh"), *each.arguments()]
        status = _passing_signals(local, {"PYTHON": sys.executable, **os.environ})
        states[i] = "done" if status == 0 else f"ended with status {status}"
        if status in (command.INTERRUPTED, command.AGAIN):
            break
    return states


def _passing_signals(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command and returns its exit status; signals reach it as well as this process."""
    process = subprocess.Popen(line, env=environment, start_new_session=True)
    before = {}
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        before[each] = signal.signal(each, lambda number, frame: process.send_signal(number))
    try:
        return process.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def collect(found: Sequence[Combination], split: str, metrics: Sequence[str]) -> str:
    """Tables the results, a line for each config and overrides: mean ± deviation over seeds.

    Args:
        found: Combinations.
        split: Such as ``test``.
        metrics: Names such as ``main/top_1``; none for the accuracies of all outputs.

    Returns:
        The table.

    Raises:
        SweepError: If no run has ended, or none has such a split.
        ValueError: If none has such a metric.
    """
    runs = {each: read_results(each.path) for each in found}
    ended = {each: results for each, results in runs.items() if results is not None}
    if not ended:
        raise SweepError(f"None of the {len(found)} runs has ended.")
    known = list(dict.fromkeys(m for r in ended.values() for m in r["splits"].get(split, ())))
    if not known:
        splits = sorted({name for r in ended.values() for name in r["splits"]})
        raise SweepError(f"No run has measured '{split}'; there is {', '.join(splits)}.")
    for metric in metrics:
        registry.choose(dict.fromkeys(known), metric, "metric")
    chosen = list(metrics) or [each for each in known if each.endswith("/top_1")] or known
    rows = [["run", "ended", *(f"{split} {metric}" for metric in chosen)]]
    for name, group in itertools.groupby(found, key=lambda each: each.name):
        members = list(group)
        results = [ended[each]["splits"].get(split, {}) for each in members if each in ended]
        rows.append([name, f"{len(results)} of {len(members)}"])
        rows[-1] += [_spread([v for r in results for v in r.get(m, ())]) for m in chosen]
    return text.align(rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, deviation = text.spread(values)
    spread = f" ± {text.number(deviation)}" if len(values) > 1 else ""
    return f"{text.number(mean)}{spread} ({len(values)})"


def overview(states: Mapping[Combination, str]) -> str:
    """Tables combinations and what became of each."""
    return text.align(
        [["workdir", "state"], *([str(each.path), state] for each, state in states.items())]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--configs", required=True, help="configs/X.py:variant,configs/…")
    parser.add_argument(
        "--seeds",
        default=[None],
        type=_integers,
        help="0,1,2: a run each; without, those of configs",
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE,…",
        help="values to try of a key of the config; several of these are combined",
    )
    parser.add_argument("--workdir", required=True, help="directory of the runs' workdirs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="check, and show what would be run")
    what.add_argument("--local", action="store_true", help="one after the other, on this machine")
    what.add_argument("--collect", action="store_true", help="show the results")
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
    return [int(each) for each in text.split(",")]


def _options(known: argparse.Namespace) -> dict[str, Any]:
    """Returns the parameters of submitit's executor."""
    named = ("partition", "nodes", "gpus_per_node", "cpus_per_task")
    given = {name: getattr(known, name) for name in named}
    options = {
        "job_name": "sire_jax",
        "time": known.minutes,
        "array_parallelism": known.at_once,
        "ntasks_per_node": known.tasks_per_node,
        "stderr_to_stdout": True,
    }
    return options | {name: value for name, value in given.items() if value is not None}


def _further(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not pair.partition("=")[2]:
            raise SweepError(f"--slurm={pair} should be --slurm=key=value.")
    return dict(pair.split("=", 1) for pair in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program with command line arguments."""
    known = _parser().parse_args(arguments)
    try:
        with command.readable_errors(goes_on=True):
            print(_sweep(known))
    except SweepError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        sys.exit(command.EXPLAINED)


def _sweep(known: argparse.Namespace) -> str:
    """Does what was asked for and returns the table that shows it."""
    found = combinations(split_configs(known.configs), known.seeds, known.override, known.workdir)
    if known.collect:
        return collect(found, known.split, known.metrics.split(",") if known.metrics else [])
    further = _further(known.slurm)
    check(found)
    states = {each: "done" if read_results(each.path) else "to run" for each in found}
    todo = [each for each in found if states[each] != "done"]
    if known.local:
        states |= zip(todo, run_here(todo), strict=True)
    elif todo and not known.dry_run:
        jobs = submit(todo, at(known.workdir) / "jobs" / "%j", _options(known), further)
        states |= zip(todo, [f"job {job}" for job in jobs], strict=True)
    return overview(states)


if __name__ == "__main__":
    main()
