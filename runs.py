"""How a command starts and what a run leaves: flags, processes, the folder, logs, checkpoints.

    config, given = parse(Config, argv, text)    flags are the fields of a frozen dataclass
    device, dtype = start_processes("auto")      torch.distributed where torchrun asks for it
    append(folder / "metrics.jsonl", row)        JSONL, read again by read_log
    save(run), resume(run)                       checkpoints of train.py's Run

torch is imported where it is needed: tables are printed and ready answers scored without it.
"""

import argparse
import ctypes
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# ---------------------------------------------------------------------------------------------
# Flags


def flag(default: Any, text: str, choices: tuple | None = None) -> Any:
    """Return a field of a Config: a flag with its default, help and choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Leave with one sentence and without the list of all flags."""
        leave(self.prog, f"{message} (--help lists all flags)")


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


def require_files(config: Any, *names: str) -> None:
    """Raise ValueError that names the first of these flags that is given and no file to read."""
    for name, path in ((name, getattr(config, name)) for name in names if getattr(config, name)):
        require(os.path.exists(path), f"--{name} {path}: there is no such file")
        require(not os.path.isdir(path), f"--{name} {path} is a folder, not a file")
        require(os.access(path, os.R_OK), f"--{name} {path} may not be read")


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


PR_SET_PDEATHSIG = 1  # of Linux' prctl: a signal for when the parent has ended
_store = []  # the key-value store that the processes met by


def start_processes(dtype: str, cuda_graphs: bool = False, trains: bool = False,
                    patience: timedelta | None = None, offload: bool = False) -> tuple[Any, Any]:
    """Return this process's device and compute type; start torch.distributed where it is needed.

    dtype: auto, bfloat16 or float32. trains: bfloat16 keeps its fp32 master weights in FSDP, so one
    process alone is a group too. patience: how long a process waits for the others. offload: FSDP
    keeps weights in the host's memory, so gradients' norms are added up there.
    """
    import torch
    import torch.distributed as dist
    cuda = torch.cuda.is_available()
    for name, wanted in (("cuda_graphs", cuda_graphs), ("offload", offload)):
        require(cuda or not wanted, f"--{name} needs a CUDA device")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # a rank whose torchrun was killed is to stop as well
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # and one whose torchrun is gone
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(place, timeout=60).close()  # the rendezvous would wait for hours
    name = ("bfloat16" if cuda else "float32") if dtype == "auto" else dtype
    backend = "cuda:nccl,cpu:gloo" if offload else "nccl" if cuda else "gloo"
    if "RANK" in os.environ and not dist.is_initialized():
        limit = {"timeout": patience} if patience else {}
        store, number, size = next(dist.rendezvous("env://", **limit))
        _store[:] = [store]
        dist.init_process_group(backend, store=store, rank=number, world_size=size, **limit)
    elif trains and (name != "float32" or offload) and not dist.is_initialized():
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


REFUSED, BROKEN = 2, 1  # exit codes; stopped by a signal: 128 and its number
SAME_STOP = 2.0  # seconds within which signals are one request to stop


def leave(command: str, error: Any) -> None:
    """End the process with one sentence, an error's notes behind it, and the exit code it has.

    Of several processes that would say the same, one says it.
    """
    stopped = isinstance(error, KeyboardInterrupt)
    notes = getattr(error, "__notes__", ["the same command begins anew"] if stopped else [])
    sentence = "; ".join([f"{command}: {'stopped' if stopped else error}", *notes])
    refused, first = isinstance(error, (str, ValueError, FileNotFoundError)), True
    if _store:
        with suppress(RuntimeError):  # the process that kept the store may be gone
            first = _store[0].add(sentence, 1) == 1
    elif rank() > 0:
        time.sleep(10)  # the first process says it; then torchrun ends this one
    if first:
        print("\n" * stopped + sentence, file=sys.stderr, flush=True)  # behind a bar
    number = (error.args or (signal.SIGINT,))[0] if stopped else 0
    sys.exit(128 + number if stopped else REFUSED if refused else BROKEN)


def interrupt(number: int, frame: Any) -> None:
    """Handle a signal as Python does Ctrl-C."""
    raise KeyboardInterrupt(number)


@contextmanager
def one_sentence(command: str, less_memory: str = ""):
    """Let whatever ends the block, SIGTERM too, end the command as `leave` does.

    less_memory: the flags that help where memory is not enough, the first to try first.
    """
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        leave(command, error)
    except (RuntimeError, MemoryError) as error:
        if not (less_memory and lacks_memory(error)):
            raise
        first = str(error).strip().split("\n")[0] or "out of memory"
        error.args = (f"{first} What needs less memory, in this order: {less_memory}",)
        leave(command, error)
    finally:
        end_processes()
        signal.signal(signal.SIGTERM, before)


def lacks_memory(error: BaseException) -> bool:
    """Return whether this is what torch or Python raise where memory is not enough."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or \
        "can't allocate memory" in str(error)


def typed(*flags: str) -> str:
    """Return the command with these flags, as one would type it."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    launch = f"torchrun --nproc_per_node {local}" if local else "python"
    return f"{launch} {shlex.join([sys.argv[0], *flags])}"


class Stopper:
    """SIGTERM and Ctrl-C ask for a stop after the batch; a later one stops at once.

    asked: the signal's number, 0 before there was one. One stop often comes as several signals
    in a row: from a scheduler, and from torchrun, which passes it on or has ended.
    """

    def __init__(self):
        self.asked, self.since, numbers = 0, 0.0, (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._ask) for number in numbers}

    def _ask(self, number, frame):
        if self.asked and time.monotonic() - self.since > SAME_STOP:
            interrupt(number, frame)
        if not self.asked:
            self.asked, self.since = number, time.monotonic()

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


def used_memory(device: Any, peak: bool = False) -> int:
    """Return the bytes in use, from where a new peak is looked for; or the last peak (Linux)."""
    if device.type == "cuda":
        import torch
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not peak:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator merely holds is not in use
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return proc_bytes("/proc/self/status", "VmHWM" if peak else "VmRSS")


def proc_bytes(path: str, name: str) -> int:
    """Return the bytes that a file of /proc gives in kB under a name."""
    with open(path) as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


# ---------------------------------------------------------------------------------------------
# JSON files

LINE_SEPARATORS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # for str.splitlines


def jsonl(*rows: dict) -> bytes:
    """Return objects as JSONL, each one line whatever its texts hold."""
    text = "".join(json.dumps(row, ensure_ascii=False).translate(LINE_SEPARATORS) + "\n"
                   for row in rows)
    return text.encode("utf-8", "backslashreplace")  # half a character has no bytes


def append(path: Path, row: dict | str | bytes) -> None:
    """Add an object to a JSONL file, or a text or bytes to any file; OSError if that cannot be."""
    data = jsonl(row) if isinstance(row, dict) else row
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        with open(path, "ab", buffering=0) as file:
            while data:  # a disk that gets full takes a part first
                data = data[file.write(data):]
    except OSError as error:
        raise unwritten(path.name, path.parent, error) from error


def unwritten(what: str, folder: Path, error: BaseException) -> OSError:
    """Return the error that says what could not be written, where, why, and what room there is."""
    first = error.__cause__ if isinstance(error.__cause__, OSError) else error
    why = getattr(first, "strerror", None) or str(first).strip().split("\n")[-1]
    free = shutil.disk_usage(folder).free / 2**30
    return OSError(f"{what} could not be written to {folder} ({why}); {free:.1f} GiB are free "
                   "there; what was saved before is whole")


def read_log(path: str | Path) -> list[dict]:
    """Return the objects of a JSONL file that a run wrote, [] where there is no file.

    A last line without its end, which a kill has torn, is left out; ValueError names another one
    that is damaged.
    """
    rows = [parse_json(line, f"{path}, line {n},") for n, line in enumerate(_whole_lines(path), 1)]
    for n, row in enumerate(rows, 1):
        require(isinstance(row, dict), f"{path}, line {n}, is not an object")
    return rows


def _whole_lines(path):
    data = Path(path).read_bytes() if Path(path).exists() else b""
    return _decoded(data[:data.rfind(b"\n") + 1], path).split("\n")[:-1]


def _decoded(data, path):
    """Return a file's bytes as text, without a byte order mark; ValueError names a wrong line."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}, is not UTF-8 text") from None


def cut(path: Path, steps: Container[int]) -> list[dict]:
    """Keep a log's lines of these steps alone, without one that a kill has torn; return them."""
    kept = [(line, row) for line, row in zip(_whole_lines(path), read_log(path))
            if row["step"] in steps]
    if path.exists():
        write_whole(path, "".join(line + "\n" for line, _ in kept))
    return [row for _, row in kept]


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file that is complete under its name, or absent; one process at a time may do so."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        append(partial, text)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def read_rows(path: str | Path) -> list:
    """Return the rows of a JSON list or of JSON lines; ValueError names the line that is wrong.

    One object that is spread over lines is one row.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return parse_json(text, path)
    try:
        return [parse_json(line, f"{path}, line {n},") for n, line in enumerate(text.split("\n"), 1)
                if line.strip()]
    except ValueError:
        with suppress(ValueError):
            return [parse_json(text, path)]
        raise


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds; ValueError names the file where it holds something else."""
    return parse_json(read_text(path), path)


def read_folders(root: str | Path) -> dict[str, Path]:
    """Return the map from data_source to folder in a JSON file; {"": root} where root is a folder.

    Folders in the file are counted from where it lies.
    """
    root = Path(root)
    if root.is_dir():
        return {"": root}
    require(root.is_file(), f"--video_root {root}: there is no such folder or file")
    folders = read_json(root)
    require(isinstance(folders, dict) and all(isinstance(v, str) for v in folders.values()),
            f"--video_root {root} is neither a folder nor JSON from data_source to folder")
    return {source: root.parent / folder for source, folder in folders.items()}


def read_text(path: str | Path) -> str:
    """Return what a UTF-8 file holds; ValueError names the file, and the line that is not UTF-8."""
    return _decoded(Path(path).read_bytes(), path)


def parse_json(text: str, where: Any) -> Any:
    """Return a JSON text's value; ValueError says `where` it is wrong."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError:  # Python reads whole numbers of at most 4,300 digits
        raise ValueError(f"{where} holds a number of too many digits") from None


# ---------------------------------------------------------------------------------------------
# What a run says of its steps


def measure(groups: list) -> dict[str, list]:
    """Return what a step did as name -> [sum, count], so that ranks add up before dividing."""
    slots = [slot for group in groups for slot in group.slots if not slot.off_policy]
    repaired = [slot for slot in slots if slot.repair is not None]
    mended = sum(slot.repair.correct for slot in repaired)
    totals = {
        "reward": [sum(slot.reward for slot in slots), len(slots)],
        "accuracy": [sum(slot.first.accuracy for slot in slots), len(slots)],
        "format": [sum(slot.first.format for slot in slots), len(slots)],
        "intervention_ratio": [len(repaired), len(slots)],
        "repair_rate": [mended, len(repaired)],
        "chosen_accuracy": [sum(slot.chosen.accuracy for slot in slots), len(slots)],
        "alignment": [sum(slot.alignment for slot in repaired), len(repaired)],
        "advantage_zero_fraction": [sum(slot.advantage == 0 for slot in slots), len(slots)],
        "completion_length": [sum(len(slot.chosen.ids_C) for slot in slots), len(slots)],
        "finished": [sum(slot.chosen.finished for slot in slots), len(slots)],
        "staleness": [sum(slot.chosen.staleness for slot in slots), len(slots)],
    }
    for slot in repaired:
        kind = slot.patch.error_type
        right, seen = totals.get(f"repair_rate/{kind}", [0, 0])
        totals[f"repair_rate/{kind}"] = [right + slot.repair.correct, seen + 1]
    return totals


def metrics(step: int, ranks: list[dict]) -> dict:
    """Return the line of metrics.jsonl from what every rank counted; a mean over nothing is null.

    The seconds are those of the slowest rank.
    """
    def ratio(name, part="totals"):
        parts = [r[part].get(name, (0, 0)) for r in ranks]
        count = sum(n for _, n in parts)
        return sum(total for total, _ in parts) / count if count else None

    def add(name, part="sums"):
        return sum(r[part].get(name, 0) for r in ranks)

    tokens, reasons = max(add("tokens"), 1), sum((r["reasons"] for r in ranks), Counter())
    asked = sum(reasons.values()) + sum(r["totals"]["intervention_ratio"][0] for r in ranks)
    kinds = {name[12:] for r in ranks for name in r["totals"] if name.startswith("repair_rate/")}
    counted = {kind: sum(r["totals"].get(f"repair_rate/{kind}", (0, 0))[1] for r in ranks)
               for kind in sorted(kinds)}
    names = dict.fromkeys(name for r in ranks for name in r["seconds"])
    seconds = max((r["seconds"] for r in ranks), key=lambda s: s["step"])
    sampling = seconds.get("decode", 0.0) + seconds.get("repair", 0.0)
    means = ("reward", "accuracy", "format", "intervention_ratio", "repair_rate", "chosen_accuracy",
             "alignment", "advantage_zero_fraction", "completion_length", "finished", "staleness")
    return {
        "step": step, "loss": add("loss"), **{name: ratio(name) for name in means},
        "repair_rate_by_error": {kind: ratio(f"repair_rate/{kind}") for kind in counted},
        "error_types": counted, "kl": add("kl") / tokens, "entropy": add("entropy") / tokens,
        "clip_fraction": add("clipped_of_all") / max(add("tokens_of_all"), 1),
        "logp_mismatch": add("mismatch") / tokens,
        "drift": add("drift") / add("stale") if add("stale") else None,
        "imbalance": add("imbalance") if "imbalance" in ranks[0]["sums"] else None,
        "grad_norm": ranks[0]["sums"]["grad_norm"], "lr": ranks[0]["sums"]["lr"],
        **{name: ratio(name, "method") for name in ranks[0]["method"]},
        "bad_samples": sum(r["bad"] for r in ranks),
        "teacher": {name: add(name, "teacher") for name in ranks[0]["teacher"]},
        "unpatched_share": sum(reasons.values()) / asked if asked else None,
        "unpatched_by_reason": dict(reasons.most_common()),
        "readers": dict(sum((r["readers"] for r in ranks), Counter())),
        "tokens_per_second": sum(r["sampled"] for r in ranks) / (sampling or 1.0),
        "peak_memory_gb": max(r["memory"] for r in ranks),
        "seconds": {name: seconds.get(name, 0.0) for name in names}}


def postfix(row: dict) -> str:
    """Return what of a step the progress bar shows."""
    shown = {"loss": "loss", "acc": "accuracy", "chosen": "chosen_accuracy", "format": "format",
             "kl": "kl", "help": "intervention_ratio", "repair": "repair_rate",
             "no patch": "unpatched_share", "tok/s": "tokens_per_second"}
    return " ".join(f"{short} {row[name]:.2f}" for short, name in shown.items()
                    if row[name] is not None)


def summary(evals: list[dict], rows: list[dict], answers: list[dict]) -> list[str]:
    """Return held-out accuracy before and after, and how the need for help changed, as lines.

    answers: of eval_answers.jsonl; where they are of several kinds, one line has those apart.
    """
    quarter = max(1, len(rows) // 4)

    def mean(part, name):
        values = [row[name] for row in part if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    def line(label, *values):
        return f"  {label:22}" + "".join("-".rjust(15) if value is None else
                                         f"{100 * value:13.1f} %" for value in values)

    def of_kind(kind, step):
        return mean([r for r in answers if (r["kind"], r["step"]) == (kind, step)], "accuracy")

    kinds = {kind: [of_kind(kind, e["step"]) for e in (evals[0], evals[-1])]
             for kind in dict.fromkeys(row["kind"] for row in answers)}
    apart = [f"{kind} {100 * a:.1f} to {100 * b:.1f} %" for kind, (a, b) in kinds.items()
             if len(kinds) > 1 and None not in (a, b)]
    names = ["intervention_ratio", "repair_rate"]
    names += ["unpatched_share"] * bool(mean(rows, "unpatched_share"))
    return [f"held-out ({evals[-1]['n']} questions)".ljust(24) + f"{'before':>15}{'after':>15}",
            line("without patches", evals[0]["accuracy"], evals[-1]["accuracy"]),
            line("with patches", *(e["accuracy_with_patches"] for e in (evals[0], evals[-1]))),
            *(["  by kind: " + ", ".join(apart)] if apart else []),
            "training".ljust(24) + f"{'first quarter':>15}{'last quarter':>15}",
            *(line(name.replace("_", " "), mean(rows[:quarter], name), mean(rows[-quarter:], name))
              for name in names)]


def keep_rollouts(run: Any, rows: list[dict]) -> bool:
    """Write a step's groups to rollouts.jsonl and their strips to thumbnails/, if there is room.

    The room is --keep_rollouts_mb, shared out over the steps, so that a long run keeps fewer of
    them and not only its first; a resumed run leaves out the same ones.
    """
    strips = {row["thumbnails"]: row.pop("strip") for row in rows}
    strips = {name: strip for name, strip in strips.items()
              if strip and not (run.output / name).exists()}
    data, room = jsonl(*rows), run.config.keep_rollouts_mb * 1e6
    size = len(data) + sum(map(len, strips.values()))
    if run.kept > room * run.step / run.steps or run.kept + size > room:
        if not run.left_out:
            say(f"\nrollouts.jsonl leaves out step {run.step} and others, for which its share of "
                f"--keep_rollouts_mb {run.config.keep_rollouts_mb} has no room")
        run.left_out = True
        return False
    (run.output / "thumbnails").mkdir(exist_ok=True)
    for name, strip in strips.items():
        write_whole(run.output / name, strip)
    append(run.output / "rollouts.jsonl", data)
    run.kept += size
    return True


class Tracker:
    """A run's figures and some of its rollouts, sent to TensorBoard or trackio.

    A resumed run goes on in the same place and sends what it repeats again: TensorBoard shows the
    latest, trackio both.
    """

    def __init__(self, kind: str, output: Path, step: int, flags: dict):
        """Begin, or go on after `step` steps."""
        self.tensorboard = kind == "tensorboard"
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.to = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        else:
            import trackio
            self.to, place = trackio, digest(str(output.resolve()))[:6]
            trackio.init("find-fix-reason", f"{output.name}-{place}", config=flags,
                         resume="allow" if flags["resume"] else "never")

    def send(self, step: int, figures: dict, text: str = "", image: Path | None = None) -> None:
        """Send the numbers in `figures`, nested ones as A/B, and perhaps a rollout and frames."""
        if not self.tensorboard:
            shown = {"rollout": self.to.Markdown(text), "frames": self.to.Image(image)} \
                if image else {}
            self.to.log(flat(figures) | shown, step=step)
            return
        for name, number in flat(figures).items():
            self.to.add_scalar(name, number, step)
        if image:
            import numpy as np
            from PIL import Image
            self.to.add_text("rollout", text, step)
            self.to.add_image("frames", np.array(Image.open(image)), step, dataformats="HWC")
        self.to.flush()


def flat(figures: dict) -> dict[str, float]:
    """Return the numbers in nested objects by their path, A/B; the step number is none."""
    numbers = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, (int, float)) and name != "step":
            numbers[name] = value
    return numbers


# ---------------------------------------------------------------------------------------------
# The folder and its checkpoints


class Folder:
    """A run's folder, held by one command at a time; a command that is refused leaves no trace.

    The lock is on the folder itself, so that it needs no file, and ends with the process.
    """

    def __init__(self, path: Path, marker: str, resume: bool):
        """Take the folder, unless another command has it or it holds a run, known by `marker`."""
        self.path, self.made, self.lock = path, [], None
        try:
            for folder in (folder for folder in reversed([path, *path.parents])
                           if not folder.exists()):
                folder.mkdir()
                self.made.append(folder)
            self.lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            require(os.access(path, os.W_OK), f"--output {path} cannot be written to")
            require(resume or not (path / marker).exists(),
                    f"--output {path} already holds a run: add --resume to go on with it, or name "
                    "another folder")
        except (OSError, ValueError) as error:
            self.close()
            if isinstance(error, ValueError):
                raise
            why = "is in use by another command" if isinstance(error, BlockingIOError) else \
                f"cannot be used: {error.strerror}"
            raise ValueError(f"--output {path} {why}") from None

    @classmethod
    def numbered(cls, stem: str, marker: str) -> "Folder":
        """Take the first of STEM-1, STEM-2, ... that nobody has taken, not in the same moment."""
        for path in (Path(f"{stem}-{number}") for number in itertools.count(1)):
            if not path.exists():
                try:
                    return cls(path, marker, resume=False)
                except ValueError:
                    if not path.exists():  # nobody was faster
                        raise

    def keep(self) -> None:
        """Let the folder stay: the run has begun."""
        self.made = []

    def close(self) -> None:
        """Give the folder back, and remove what was made for a run that did not begin."""
        if self.lock is not None:
            os.close(self.lock)
        for folder in reversed(self.made):
            with suppress(OSError):
                folder.rmdir()
        self.lock, self.made = None, []


ASKED_WITH = "frames", "max_pixels", "max_image_pixels", "max_completion"
POSITIONS = "as in vLLM; transformers 5.3 and later differ on long videos (docs/models.md)"


def check_model(path: str) -> None:
    """Refuse a --model that is no folder or hub name; name the checkpoint of a run's folder."""
    newest = newest_checkpoint(path)
    require(not newest, f"--model {path} is a run's folder: its newest checkpoint is {newest}")
    folder, hub = Path(path), re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    require(folder.is_dir() or hub and not folder.exists(),
            f"--model {path}: there is no such folder")
    found = [name for name in ("config.json", "adapter_config.json") if (folder / name).exists()]
    require(not folder.is_dir() or found, f"--model {path} is no checkpoint: it has no config.json")
    require(len(found) < 2, f"--model {path} has whole weights and an adapter: which is meant?")


def asked_with(config: Any, given: set[str]) -> Any:
    """Return the flags with what the checkpoint was trained to be asked with, and say so.

    student.json in the checkpoint has it; a flag that was given wins.
    """
    saved = trained_with(config.model)
    changes = {name: saved[name] for name in ASKED_WITH if name in saved and name not in given
               and getattr(config, name, saved[name]) != saved[name]}
    wording = bool(saved.get("template")) and "template" not in given
    if changes or wording:
        said = [f"--{name} {value}" for name, value in changes.items()] + ["its wording"] * wording
        say(f"as {config.model} was trained: {', '.join(said)}")
    return replace(config, **changes)


def trained_with(model: str) -> dict:
    """Return what student.json in a checkpoint says, {} where there is none."""
    path = Path(model) / "student.json"
    return read_json(path) if path.is_file() else {}


def wording(config: Any) -> str | None:
    """Return the question's wording: --template's, else the one the checkpoint was trained with."""
    return read_text(config.template) if config.template else \
        trained_with(config.model).get("template")


@contextmanager
def waiting_for(path: Path):
    """Hold a folder in the block; wait while another command holds it, and say so."""
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another command, which is at work on {path}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def going_on(config: Any, given: set[str], free: set[str]) -> Any:
    """Return the flags of the run in --output, with those of `free` that are given beside --resume.

    ValueError where another flag is given with another value: the run would not be what it is.
    """
    output, kind = Path(config.output), type(config)
    if not (output / "config.json").exists():
        require((output / "checkpoints").is_dir(), f"--resume: {output} holds no run")
        return config  # its config.json was lost: all flags have to be given
    saved = read_json(output / "config.json")
    before = kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved})
    for name in sorted(given - free):
        now, was = getattr(config, name), getattr(before, name)
        require(now == was, f"--{name} {now}: the run in {output} has {was}, and cannot go on with "
                "another value")
    changes = {name: getattr(config, name) for name in given & free}
    return replace(before, **changes | {"resume": True, "output": str(output)})


def digest(*parts: Any) -> str:
    """Return a short name for bytes, texts and JSON values that no other ones have."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return whole.hexdigest()


def about(files: dict[str, str], student: str, frozen: str) -> dict:
    """Return what config.json says of a run beside its flags: how it came about.

    files: paths by flag, whose contents the run depends on; student, frozen: digests of its
    architecture and of the weights that it reads and never changes.
    """
    import torch
    import transformers
    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, **here).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], check=False, **here).stdout
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"command": shlex.join(sys.argv), "commit": commit + "+changes" * bool(dirty),
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "cards": cards, "processes": world_size(),
            "student": student, "frozen": frozen, "files": {flag: digest(Path(path).read_bytes())
                                          for flag, path in files.items() if path}}


def save(run: Any) -> None:
    """Write a checkpoint of the run after `run.step` steps: complete under its name, or absent.

    Hugging Face weights and processor for everybody; to go on from, training_state/ (fp32 weights,
    optimizer, the method's copy) and what the method keeps on each rank. There is no random state:
    every random number derives from (seed, step, sample). progress.json, written last, has the
    size and digest of every file. OSError, with the disk's free space, where it cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    folder = run.output / "checkpoints" / f"step-{run.step:06d}"
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    try:
        _write_checkpoint(run, partial)
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        failure = unwritten(f"the checkpoint of step {run.step}", run.output, error)
        shutil.rmtree(partial, ignore_errors=True)
        raise failure from error
    if rank() == 0:
        partial.rename(folder)
        for old in _checkpoints(run.output)[:-run.config.keep_checkpoints]:
            shutil.rmtree(old)
    everyone(None)


def _write_checkpoint(run, partial):
    """Write all files of a checkpoint, and then progress.json."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    everyone(None)
    run.student.save(partial, run.dtype, run.config.merge)
    if rank() == 0:
        saved = {name: getattr(run.config, name) for name in ASKED_WITH}
        saved |= {"template": wording(run.config), "positions": POSITIONS}
        write_whole(partial / "student.json", json.dumps(saved, indent=1))
    with _alone():
        dcp.save(_training_state(run), no_dist=not dist.is_initialized(),
                 checkpoint_id=partial / "training_state")
    if (state := run.method.state()) is not None:
        torch.save(state, partial / f"method-{rank()}.pt")
    bad = sum(everyone(run.bad))
    if rank() == 0:
        progress = {"step": run.step, "processes": world_size(), "bad_samples": bad,
                    "files": _sums(partial)}
        write_whole(partial / "progress.json",
                    json.dumps(progress | {"sum": digest(progress)}, indent=1))


def _sums(folder):
    """Return size and digest of every file in a folder, by its path there."""
    def summed(path):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return [path.stat().st_size, found]

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        return {str(path.relative_to(folder)): sizes
                for path, sizes in zip(paths, pool.map(summed, paths))}


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, "" where it is as it was written."""
    try:
        progress = read_json(folder / "progress.json")
        require(progress.pop("sum") == digest(progress), "progress.json has other bytes")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"progress.json: {error}"
    found = _sums(folder)
    for name, sizes in progress["files"].items():
        if found.get(name) != sizes:
            size, now = sizes[0], found.get(name, [None])[0]
            return f"{name} " + ("is missing" if now is None else f"has {now} bytes, not {size}"
                                 if now != size else "has other bytes")
    return ""


def _training_state(run):
    """Return everything that is sharded and changes; the frozen weights are --model's."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
    weights, optimizer = get_state_dict(run.student, run.optimizer)
    named = run.student.named_parameters(remove_duplicate=False)
    changing = {name for name, weight in named if weight.requires_grad}
    weights = {name: weight for name, weight in weights.items() if name in changing}
    copy = {"copy": get_model_state_dict(run.method.copy)} if run.method.copy else {}
    return {"weights": weights, "optimizer": optimizer, **copy}


@contextmanager
def _alone():
    """Hide torch's warning that one process saves and loads alone, which is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _checkpoints(output):
    """Return the folders of a run's checkpoints, oldest first."""
    found = (Path(output) / "checkpoints").glob("step-" + 6 * "[0-9]")
    return sorted(path for path in found if path.is_dir())


def newest_checkpoint(output: str | Path) -> Path | None:
    """Return the folder of the newest complete checkpoint, None where there is none."""
    return next(reversed(_checkpoints(output)), None)


def undamaged_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint that is as it was written; name those that are not.

    What a kill or a full disk has left of others goes. ValueError where all are damaged.
    """
    for partial in (output / "checkpoints").glob("*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    reasons = []
    for folder in reversed(_checkpoints(output)):
        if not (reason := damage(folder)):
            print("".join(f"{r}: going on from {folder.name}\n" for r in reasons), end="",
                  file=sys.stderr)
            return folder
        reasons.append(f"{folder} is damaged ({reason})")
    require(not reasons, f"no checkpoint can be read: {'; '.join(reasons)}")
    return None


def resume(run: Any) -> None:
    """Go on from the newest checkpoint; log lines of steps that will be repeated are cut."""
    folder, = everyone(undamaged_checkpoint(run.output) if rank() == 0 else None)[:1]
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


def cut_logs(run: Any) -> None:
    """Drop what a run's logs say of steps that are still to be made."""
    made = range(run.step)
    cut(run.output / "metrics.jsonl", made)
    cut(run.output / "patches.jsonl", made)
    cut(run.output / "bad_samples.jsonl", range(-1, sys.maxsize))  # none is noted twice
    evals = cut(run.output / "eval.jsonl", range(run.step + 1))  # evaluated after so many steps
    cut(run.output / "eval_answers.jsonl", {row["step"] for row in evals})
    shown = {row["thumbnails"] for row in cut(run.output / "rollouts.jsonl", made)}
    for path in (run.output / "thumbnails").glob("*"):
        if f"thumbnails/{path.name}" not in shown:
            path.unlink()
    kept = [run.output / "rollouts.jsonl", *(run.output / "thumbnails").glob("*")]
    run.kept = sum(path.stat().st_size for path in kept if path.exists())
    if (samples := run.output / "samples.md").exists():
        parts = re.split(r"(?m)^(?=## step \d+, sample )", samples.read_text(encoding="utf-8"))
        kept = [part for part in parts if part and int(part.split()[2].rstrip(",")) < run.step]
        write_whole(samples, "".join(kept))


def _load(run, folder, step):
    """Read the state of a checkpoint into the run's student, optimizer and method."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (StateDictOptions, set_model_state_dict,
                                                         set_state_dict)
    own = folder / f"method-{rank()}.pt"
    run.method.resume(step, torch.load(own) if own.exists() else None)
    state = _training_state(run)
    with _alone():
        dcp.load(state, no_dist=not dist.is_initialized(), checkpoint_id=folder / "training_state")
    set_state_dict(run.student, run.optimizer, model_state_dict=state["weights"],
                   optim_state_dict=state["optimizer"], options=StateDictOptions(strict=False))
    if run.method.copy:
        set_model_state_dict(run.method.copy, state["copy"])
