"""How a command starts and what a run leaves: flags, processes, the folder, logs, checkpoints.

    config, given = parse(Config, argv, text)    flags are the fields of a frozen dataclass
    device, dtype = start_processes("auto")      torch.distributed where torchrun asks for it
    append(folder / "metrics.jsonl", row)        JSONL, read again by read_log
    save(run), resume(run)                       checkpoints of train.py's Run

torch is imported where it is needed: tables are printed and ready answers scored without it.
"""

import argparse
import difflib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------------
# Flags


def flag(default: Any, text: str, choices: tuple | None = None) -> Any:
    """Return a field of a Config: a flag with its default, help and choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Leave with one sentence and without the list of all flags."""
        leave(self.prog, f"{message} (--help lists all flags)", code=2)


def parse(kind: type, argv: list[str] | None, text: str) -> tuple[Any, set[str]]:
    """Return the command line as a `kind`, and the names of the flags that were given.

    An unknown flag is an error that names the nearest one.
    """
    parser = _Parser(description=text, allow_abbrev=False)
    for f in fields(kind):
        typed = {"type": f.type, "choices": f.metadata["choices"]}
        shown = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=shown,
                            **({"action": "store_true"} if f.type is bool else typed))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{f.name}" for f in fields(kind)]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1)
        parser.error(f"unknown: {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return kind(**vars(given)), set(vars(given))


def require(condition: Any, sentence: str) -> None:
    """Raise ValueError with the sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError that names the first of these flags that is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"--{name} must be positive, got {value}")


def changed(config: Any) -> str:
    """Return the flags that are not at their defaults, as one would type them."""
    values = {f.name: getattr(config, f.name) for f in fields(config)
              if getattr(config, f.name) != f.default}
    return " ".join(f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
                    for name, value in values.items())


# ---------------------------------------------------------------------------------------------
# Processes


def rank() -> int:
    """Return this process's number among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def everyone(value: Any) -> list:
    """Return the value of every rank, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


_store = []  # the key-value store that the processes met by


def start_processes(dtype: str, cuda_graphs: bool = False, trains: bool = False,
                    patience: timedelta | None = None) -> tuple[Any, Any]:
    """Return this process's device and compute type; start torch.distributed where it is needed.

    dtype: auto, bfloat16 or float32. trains: bfloat16 keeps its fp32 master weights in FSDP, so one
    process alone is a group too. patience: how long a process waits for the others.
    """
    import torch
    import torch.distributed as dist
    cuda = torch.cuda.is_available()
    require(cuda or not cuda_graphs, "--cuda_graphs needs a CUDA device")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    name = ("bfloat16" if cuda else "float32") if dtype == "auto" else dtype
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ and not dist.is_initialized():
        limit = {"timeout": patience} if patience else {}
        store, number, size = next(dist.rendezvous("env://", **limit))
        _store[:] = [store]
        dist.init_process_group(backend, store=store, rank=number, world_size=size, **limit)
    elif trains and name != "float32" and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, getattr(torch, name)


def end_processes() -> None:
    """Leave torch.distributed where it was started."""
    if "torch" in sys.modules:
        import torch.distributed as dist
        if dist.is_initialized():
            dist.destroy_process_group()


def say(text: str) -> None:
    """Print on the first process."""
    if rank() == 0:
        print(text, flush=True)


def leave(command: str, error: Any, code: int = 1) -> None:
    """End the process with one sentence; of several that would say the same, one says it."""
    sentence, first = f"{command}: {error}", True
    if _store:
        with suppress(RuntimeError):  # the process that kept the store may be gone
            first = _store[0].add(sentence, 1) == 1
    elif rank() > 0:
        time.sleep(10)  # the first process says it; then torchrun ends this one
    if first:
        print(sentence, file=sys.stderr, flush=True)
    sys.exit(code)


class Stopper:
    """SIGTERM and Ctrl-C ask for a stop after the step; a second one stops at once."""

    def __init__(self):
        self.asked, numbers = False, (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._ask) for number in numbers}

    def _ask(self, number, frame):
        if self.asked:
            signal.default_int_handler(number, frame)
        self.asked = True

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Phases:
    """Seconds per phase of a step; what no phase claims is `other`, so that they add up."""

    def __init__(self, device: Any):
        self.device, self.seconds = device, {}
        self.start = self._now()

    @contextmanager
    def __call__(self, name: str):
        """Add the time of the block to a phase."""
        begin = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - begin

    def _now(self):
        if self.device.type == "cuda":
            import torch
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def all(self) -> dict[str, float]:
        """Return seconds by phase, and of the whole step."""
        step = self._now() - self.start
        return {**self.seconds, "other": step - sum(self.seconds.values()), "step": step}


def peak_memory(device: Any) -> float:
    """Return the most memory used so far in GiB: of the card, or of this process on a CPU."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------------------------------
# JSON files

LINE_SEPARATORS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # for str.splitlines


def append(path: str | Path, row: dict) -> None:
    """Add one object to a JSONL file; several processes may do so at once."""
    with open(path, "ab", buffering=0) as file:
        file.write(json_line(row))


def json_line(row: dict) -> bytes:
    """Return an object as one line, whatever its texts hold: half characters, line separators."""
    text = json.dumps(row, ensure_ascii=False).translate(LINE_SEPARATORS)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_log(path: str | Path) -> list[dict]:
    """Return the objects of a JSONL file that a run wrote, [] where there is no file.

    A last line without its end, which a kill has torn, is left out; ValueError where another is
    damaged.
    """
    return [parse_json(line, f"{path}, line {n},") for n, line in enumerate(_whole_lines(path), 1)]


def _whole_lines(path):
    data = Path(path).read_bytes() if Path(path).exists() else b""
    return data[:data.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]


def cut(path: Path, last: int) -> None:
    """Drop a log's lines of steps after `last`, and a last line that was torn by a kill."""
    if path.exists():
        rows = zip(_whole_lines(path), read_log(path))
        write_whole(path, "".join(line + "\n" for line, row in rows if row["step"] <= last))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is complete under its name, or absent; one process at a time may do so."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def read_rows(path: str | Path) -> list:
    """Return the rows of a JSON list or of JSON lines; ValueError names the line that is wrong."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return parse_json(text, path)
    lines = text.split("\n")
    return [parse_json(line, f"{path}, line {n},") for n, line in enumerate(lines, 1)
            if line.strip()]


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds; ValueError names the file where it holds something else."""
    return parse_json(Path(path).read_text(encoding="utf-8-sig"), path)


def parse_json(text: str, where: Any) -> Any:
    """Return a JSON text's value; ValueError says `where` it is wrong."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


# ---------------------------------------------------------------------------------------------
# The folder and its checkpoints


def claim(output: Path, marker: str, resume: bool) -> None:
    """Refuse a folder that holds a run, known by its file `marker`, unless it is to go on."""
    require(resume or not (output / marker).exists(),
            f"--output {output} already holds a run: add --resume to go on with it, or name "
            "another folder")
    output.mkdir(parents=True, exist_ok=True)


def save(run: Any) -> None:
    """Write a checkpoint of the run after `run.step` steps: complete under its name, or absent.

    Hugging Face weights and processor for everybody; to go on from, training_state/ (fp32 weights,
    optimizer, the method's copy) and what the method keeps on each rank. There is no random state:
    every random number derives from (seed, step, sample).
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    folder = run.output / "checkpoints" / f"step-{run.step:06d}"
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    everyone(None)
    run.student.save(partial, run.dtype)
    with _alone():
        dcp.save(_training_state(run), no_dist=not dist.is_initialized(),
                 checkpoint_id=partial / "training_state")
    if (state := run.method.state()) is not None:
        torch.save(state, partial / f"method-{rank()}.pt")
    bad = sum(everyone(run.bad))
    if rank() == 0:
        progress = {"step": run.step, "processes": world_size(), "bad_samples": bad}
        (partial / "progress.json").write_text(json.dumps(progress))
        partial.rename(folder)
        for old in sorted(folder.parent.glob("step-??????"))[:-run.config.keep_checkpoints]:
            shutil.rmtree(old)
    everyone(None)


def _training_state(run):
    """Return everything that is sharded."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
    weights, optimizer = get_state_dict(run.student, run.optimizer)
    copy = {"copy": get_model_state_dict(run.method.copy)} if run.method.copy else {}
    return {"weights": weights, "optimizer": optimizer, **copy}


@contextmanager
def _alone():
    """Hide torch's warning that one process saves and loads alone, which is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def newest_checkpoint(output: str | Path) -> Path | None:
    """Return the folder of the newest complete checkpoint, None where there is none."""
    return max((Path(output) / "checkpoints").glob("step-??????"), default=None)


def resume(run: Any) -> None:
    """Go on from the newest checkpoint; log lines of steps that will be repeated are cut."""
    folder = newest_checkpoint(run.output)
    if folder is None:
        say(f"{run.output} has no checkpoint yet: starting from the beginning")
        progress = {"step": 0, "bad_samples": 0}
    else:
        progress = read_json(folder / "progress.json")
        require(progress["processes"] == world_size(),
                f"{folder} was written by {progress['processes']} processes: resume with as many, "
                f"not {world_size()}")
        _load(run, folder, progress["step"])
    run.step, run.bad = progress["step"], progress["bad_samples"] if rank() == 0 else 0
    if rank() == 0:
        cut(run.output / "metrics.jsonl", run.step - 1)
        cut(run.output / "patches.jsonl", run.step - 1)
        cut(run.output / "eval.jsonl", run.step if run.step < run.steps else run.step - 1)
    everyone(None)


def _load(run, folder, step):
    """Read the state of a checkpoint into the run's student, optimizer and method."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_state_dict
    own = folder / f"method-{rank()}.pt"
    run.method.resume(step, torch.load(own) if own.exists() else None)
    state = _training_state(run)
    with _alone():
        dcp.load(state, no_dist=not dist.is_initialized(), checkpoint_id=folder / "training_state")
    set_state_dict(run.student, run.optimizer, model_state_dict=state["weights"],
                   optim_state_dict=state["optimizer"])
    if run.method.copy:
        set_model_state_dict(run.method.copy, state["copy"])
