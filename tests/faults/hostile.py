"""Hostile checkpoints: names that would run code, paths that lead outside, sizes that would fill the memory.

Each either ends in one line and status 2 or, where the table says so, does what was asked for and no more. Nothing
else may be written or read, and no output may hold anything that a terminal obeys.
"""

import os
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import forks
from tests.faults.cases import Case
from tests.faults.damage import STEP
from tests.faults.forge import (
    Maker,
    Place,
    added,
    beside,
    check_reads,
    entry,
    fields,
    forget_reads,
    key,
    lay_out,
    newer,
    pickled,
    raw,
    replaced,
    sparse,
    spelled,
    table,
    tree,
    twice,
    without,
)

MEMORY = 2**30
SECONDS = 20.0
SECRET = "canary-7d1f"  # in an environment variable that no file may have read
ESCAPE = "\x1b]0;owned\x07\x1b[2J\r"
COMMANDS = {
    "info": ("ckpt={}",),
    "sample": ("ckpt={}", "n=2", "sampler.num_steps=2", "device=cpu"),
    "train": ("trainer.resume={}", "device=cpu"),
}
LOCK = "here/run/.lock"  # an empty file, taken before anything in the folder is believed
WRITES = {"info": (), "sample": ("here/run/samples",), "train": ("here/run",)}  # where a command may
ALL = ("info", "sample", "train")
SAMPLE = 40
INFO = ("info",)  # reads the header alone
UNTRAINED = ("info", "sample")  # have no use for what only training needs
TRAINED = ("info", "train")  # which do not sample


@dataclass(frozen=True)
class Entry:
    """`fine`: the commands that go on, as they use nothing of what is wrong; `first` is run in the short form.

    `spec` is typed as the checkpoint; `late`: refused when the run's own folder has been written to already.
    """

    name: str
    make: Maker
    first: str = "sample"
    fine: tuple[str, ...] = ()
    spec: str = f"run/checkpoints/step_{STEP:07d}.safetensors"
    late: bool = False


UNET = {"name": "unet", "channels": [2048] * 4, "num_blocks": 16, "attention": [0, 1], "head_dim": 8,
        "norm_groups": 8, "dropout": 0.0, "conditional": True}  # fmt: skip
MANY = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
PERSIAN = {"name": "persian", "image_size": 28, "remaining": False}
FIRST = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def at(path: str) -> Maker:
    """The dataset a folder of images."""
    return key("", "dataset", {"name": "folder", "image_size": 8, "path": path})


def metrics(line: str) -> Maker:
    return beside("metrics.jsonl", lambda path: path.write_text(line + "\n"))


def linked(path: Path) -> None:
    path.symlink_to(path.parents[2] / "canary" / "config.yaml")


# fmt: off
ENTRIES = (
    # names that something might import, call or interpolate
    Entry("_target_ at the top of the config", key("", "_target_", "os.system")),
    Entry("_target_ in the model", key("model", "_target_", "os.system"), "info"),
    Entry("_target_ in the dataset", key("dataset", "_target_", "os.system"), "train"),
    Entry("_target_ in the sampler", key("sampler", "_target_", "subprocess.run")),
    Entry("_target_ in the facts", fields(facts___target_="os.system"), "train"),
    Entry("_target_ as the value of a number", fields(config__optimizer__lr={"_target_": "os.getpid"}), "train"),
    Entry("plugins in the config", key("", "plugins", ["hostile_plugin"]), "train"),
    Entry("defaults and hydra in the config", key("", "hydra", {"run": {"dir": "../canary"}}), "train"),
    Entry("a dotted dataset", fields(config__dataset__name="hostile_plugin.run"), "train"),
    Entry("a dotted model", fields(config__model__name="torch.load")),
    Entry("a dotted sampler", fields(config__sampler__name="builtins.eval")),
    Entry("an entry point as schedule", fields(config__schedule__name="hostile_plugin:run"), "info"),
    Entry("a sampler that is a file", fields(config__sampler__name="../../here/hostile_plugin")),
    Entry("oc.env as the sampler", fields(config__sampler__name="${oc.env:CANARY}")),
    Entry("oc.env as the spacing", fields(config__sampler__spacing="${oc.env:CANARY}")),
    Entry("oc.decode as the spacing", fields(config__sampler__spacing="${oc.decode:'[${oc.env:CANARY}]'}")),
    Entry("oc.env as data_root", fields(config__data_root="${oc.env:HOME}"), "train"),
    Entry("hydra: as the dataset's path", at("${hydra:runtime.cwd}"), "train"),
    Entry("oc.env in the facts", fields(facts__name="${oc.env:CANARY}"), "train", ("info", "sample")),
    Entry("a quote in the spacing", fields(config__sampler__spacing="karras',sampler.rho=9,x='"), fine=TRAINED),
    Entry("backslashes in the spacing", fields(config__sampler__spacing="karras\\\\' +n=9 '\\"), fine=TRAINED),
    Entry("a line break in the spacing", fields(config__sampler__spacing="karras\nrun_dir: ../canary")),
    Entry("a list in the spacing", fields(config__sampler__spacing=["[1,2]", "${oc.env:CANARY}"])),
    Entry("a sweep as the spacing", fields(config__sampler__spacing="choice(karras,linspace)"), fine=TRAINED),
    Entry("a line break in the schedule", fields(config__schedule__name="linear\n_target_: os.system"), "info"),
    Entry("quotes in the dataset's path", at("x' overwrite=true '\\"), "train", UNTRAINED),
    # pickles
    Entry("a pickle renamed", lambda place: pickled(place, inside=False)),
    Entry("a pickle inside the metadata", lambda place: pickled(place, inside=True)),
    # paths
    Entry("data_root outside", fields(config__data_root="{canary}"), "train", ALL),
    Entry("data_root, in use", fields(config__dataset=PERSIAN, config__data_root="{canary}"), "train", UNTRAINED),
    Entry("run_dir outside", fields(config__run_dir="{canary}"), "train", ALL),
    Entry("run_dir outside, overwrite", fields(config__run_dir="../canary", config__overwrite=True), "train", ALL),
    Entry("a dataset's folder outside", at("../canary"), "train", UNTRAINED),
    Entry("a dataset's folder outside, absolute", at("{canary}"), "train", UNTRAINED),
    Entry("resume outside, in the config", fields(config__trainer__resume="{canary}"), "train", ALL),
    Entry("init_from outside, in the config", fields(config__trainer__init_from="{canary}"), "train", ALL),
    # sizes
    Entry("a network of 10^10 parameters", key("", "model", UNET), "train", INFO),
    Entry("a hidden layer of 65,536", fields(config__model__hidden=65_536, facts__image_size=1024), fine=INFO),
    Entry("images of 1,024", fields(facts__image_size=1024), fine=INFO),
    Entry("a layer of 10^12", fields(config__model__hidden=10**12)),
    Entry("100,000 timesteps", fields(config__schedule__num_timesteps=100_000), fine=ALL),
    Entry("10^9 timesteps", fields(config__schedule__num_timesteps=10**9)),
    Entry("a million classes", fields(facts__class_names=["x"] * 10**6, facts__num_classes=10**6), "info"),
    Entry("10,000 classes", fields(facts__class_names=["x"] * 10**4, facts__num_classes=10**4), fine=INFO),
    Entry("a shape of 2^40", entry(shape=[2**40])),
    Entry("a shape whose product overflows", entry(shape=[2**32, 2**32, 4])),
    Entry("a shape below 0", entry(shape=[-8, -1])),
    Entry("a shape of floats", entry(shape=[8.0])),
    Entry("a shape of texts", entry(shape=["8"])),
    Entry("a shape of booleans", entry(shape=[True]), "info"),
    Entry("a shape of lists", entry(shape=[[8]]), "info"),
    Entry("a shape of 10,000 dimensions", entry(shape=[1] * 10_000), "info"),
    Entry("an unknown dtype", entry(dtype="F4"), "train"),
    Entry("a dtype of torch's", entry(dtype="torch.load")),
    Entry("a list as dtype", entry(dtype=["F32"]), "info"),
    Entry("overlapping tensors", table(lambda entries: entries.update(again=entries[min(entries)])), "train"),
    Entry("offsets past the end", entry(data_offsets=[0, 2**40])),
    Entry("offsets below 0", entry(data_offsets=[-32, 0]), "info"),
    Entry("a hole", table(lambda entries: entries.pop(min(entries)))),
    Entry("bytes behind the last tensor", table(lambda entries: None, b"\0" * 64)),
    Entry("a tensor named twice", twice(), "info"),
    Entry("no entries", raw(lambda: b'{"__metadata__":null}'), "info"),
    Entry("50,000 tensors", table(lambda entries: entries.update(MANY)), "info"),
    Entry("a header of 100 MB", raw(lambda: b" " * 10**8), "info"),
    Entry("a header of 2 GB", raw(lambda: b"{", length=2**31, file_size=2**31 + 100)),
    Entry("a header longer than any file", raw(lambda: b"{}", length=2**64 - 1), "info"),
    Entry("a header 100,000 deep", raw(lambda: b"[" * 100_000), "info"),
    Entry("metadata 100,000 deep", spelled('"facts": {', '"facts": ' + '{"a":' * 100_000 + "{"), "info"),
    Entry("a tensor of 64 GB that nothing uses", sparse("extra", 2**36), fine=INFO),
    Entry("a tensor of 64 GB in the network", sparse("ema.extra", 2**36), "train", INFO),
    # numbers
    Entry("NaN as a figure", spelled('"figures": {', '"figures": {"val_loss": NaN, '), "info"),
    Entry("Infinity in the config", spelled('"lr": ', '"lr": Infinity, "l": '), "train"),
    Entry("NaN in the facts", spelled('"channels": 1', '"channels": NaN')),
    Entry("1e999 in the config", spelled('"lr": 0.', '"lr": 1e999, "l": 0.'), "train"),
    Entry("true as the step", fields(step=True), "train"),
    Entry("a step below 0", fields(step=-1), "train"),
    Entry("a step of 10^30", fields(step=10**30), "info"),
    Entry("half a step", fields(step=2.5), "train"),
    Entry("a seed of 10^400", fields(config__seed=10**400), "info"),
    Entry("a figure of 10^400", fields(figures__val_loss=10**400), "info"),
    Entry("a number of 10,000 digits", spelled('"seed": 0', '"seed": 1' + "0" * 10_000), "info"),
    # what a terminal would obey
    Entry("escapes in the data's name", fields(facts__name=ESCAPE), "info"),
    Entry("escapes in a version", fields(versions__torch=ESCAPE), "info"),
    Entry("escapes in a figure's name", fields(figures={ESCAPE: 1.0}), "info"),
    Entry("escapes in a class", fields(facts__class_names=[ESCAPE] * 10), "train"),
    Entry("escapes in the spacing", fields(config__sampler__spacing=ESCAPE), "info"),
    Entry("escapes in the dataset's path", at(ESCAPE), "train"),
    Entry("escapes in the model's name", fields(config__model__name=ESCAPE), "info"),
    Entry("escapes in a key", key("model", ESCAPE, 1), "info"),
    Entry("escapes in the device", fields(config__device=ESCAPE), "train"),
    Entry("escapes in the format version", fields(format_version=ESCAPE), "info"),
    Entry("escapes in a tensor's name", table(lambda entries: entries.update({ESCAPE: FIRST})), "info"),
    Entry("a NUL in a name", fields(facts__name="di\0gits"), "info"),
    Entry("a lone surrogate", fields(facts__name="\ud800"), "info"),
    Entry("invalid UTF-8", raw(lambda: b'{"__metadata__":{"ddpm":"\xff\xfe"}}'), "info"),
    Entry("escapes in a newer file", newer(table(lambda found: found.update({ESCAPE: FIRST}))), "train", ALL, "run"),
    # tensors
    Entry("weights that are NaN", replaced("model.", "ema.", by=lambda t: t * torch.nan), fine=INFO),
    Entry("weights that are infinite", replaced("ema.", by=lambda t: t + torch.inf), fine=INFO),
    Entry("weights of another type", replaced("model.", "ema.", by=lambda t: t.long()), fine=INFO),
    Entry("no average", without("ema."), fine=INFO),
    Entry("no moments", without("optimizer."), "train", ALL),  # as if it had been converted
    Entry("moments of another shape", replaced("exp_avg", by=lambda t: t[:1]), "train", INFO),
    Entry("moments below 0", replaced("exp_avg_sq", by=lambda t: -t - 1), "train", UNTRAINED),
    Entry("moments that are NaN", replaced("exp_avg", by=lambda t: t * torch.nan), "train", UNTRAINED),
    Entry("moments of another type", replaced("exp_avg", by=lambda t: t.half()), "train", INFO),
    Entry("a step of the optimizer below 0", replaced(".step", by=lambda t: t - 9), "train", UNTRAINED),
    Entry("a tensor of 200 MB that nothing uses", added("extra", 200 * 2**20), "train", INFO),
    Entry("facts of three colours", fields(facts__channels=3), fine=INFO),
    Entry("facts of three classes", fields(facts__num_classes=3, facts__class_names=["a", "b", "c"]), fine=INFO),
    Entry("fewer names than classes", fields(facts__class_names=["a", "b", "c"]), "info"),
    Entry("another dataset's facts", fields(facts__name="mnist"), "train", ("info", "sample")),
    # other files of the run
    Entry("metrics of words", metrics('{"step": "3"}'), "train", ALL),
    Entry("metrics of numbers in quotes", metrics('{"step": "3", "loss": "1"}'), "train", ALL),
    Entry("metrics without an error", metrics('{"step": 3, "loss": 1, "val_loss": 1}'), "train", ALL),
    Entry("metrics below 0", metrics('{"step": -3e299, "loss": -1}'), "train", ALL),
    Entry("metrics of bytes", beside("metrics.jsonl", lambda path: path.write_bytes(b'\xff\xfe\0')), "train", ALL),
    Entry("metrics 100,000 deep", metrics("[" * 10**5), "train", ALL),
    Entry("metrics from a pipe", beside("metrics.jsonl", os.mkfifo), "train", UNTRAINED, late=True),
    Entry("a log that is written elsewhere", beside("train.log", linked), "train", UNTRAINED),
    Entry("a lock that empties another file", beside(".lock", linked), "train", UNTRAINED),
    # kinds of files
    Entry("a link to a secret", lambda place: place.file.symlink_to(place.root / "other.txt"), "info"),
    Entry("a link to itself", lambda place: place.file.symlink_to(place.file), "info"),
    Entry("a link to /dev/zero", lambda place: place.file.symlink_to("/dev/zero")),
    Entry("a pipe", lambda place: os.mkfifo(place.file)),
    Entry("a folder", lambda place: place.file.mkdir(), "train"),
)
# fmt: on


def hostile(folder: Path, count: int) -> str:
    """The first `count` of: all with a command in forks, some of them as installed, all with the other commands."""
    mixed = random.Random(3).sample(ENTRIES, len(ENTRIES))
    trials = [(trial, trial.first, False) for trial in mixed]
    trials += [(trial, trial.first, True) for trial in mixed[:SAMPLE]]
    trials += [(trial, program, False) for trial in mixed for program in COMMANDS if program != trial.first]
    trials = trials[:count]
    heaviest, slowest, fine, problems = 0, 0.0, 0, []
    for number, (trial, program, real) in enumerate(trials):
        place = lay_out(folder / str(number))
        trial.make(place)
        try:
            outcome = _try(trial, program, place, real)
            heaviest, slowest = max(heaviest, outcome.peak), max(slowest, outcome.seconds)
            fine += outcome.status == 0
        except AssertionError as error:
            problems.append(f"{trial.name}: {error}")
    assert not problems, f"{len(problems)} of {len(trials)}:\n" + "\n".join(problems)
    files = len({trial.name for trial, _, _ in trials})
    return (
        f"{len(trials)} commands on {files} files: {len(trials) - fine} refused in one line, {fine} harmless; "
        f"at most {heaviest / 2**20:.0f} MiB and {slowest:.1f} s"
    )


def _try(trial: Entry, program: str, place: Place, real: bool) -> forks.Outcome:
    before = tree(place.root)
    forget_reads(place.canary)
    outcome = forks.run(
        program,
        *(argument.format(trial.spec) for argument in COMMANDS[program]),
        cwd=place.here,
        real=real,
        CANARY=SECRET,
        DDPM_CACHE=str(place.root / "cache"),
        DDPM_NATIVE="0",  # else each trial would find no compiled GroupNorm, and leave one
    )
    if program in trial.fine:
        assert outcome.status == 0, f"harmless, but {outcome}"
    else:
        forks.refused(outcome)
    output = outcome.stdout + outcome.stderr
    obeyed = {c for c in output if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - {"\n"}
    assert not obeyed, f"{obeyed} in the output: {outcome}"
    assert SECRET not in output and "Traceback" not in output, f"{outcome}"
    assert outcome.peak < MEMORY and outcome.seconds < SECONDS, f"too much: {outcome}"
    check_reads(place.canary)
    after = tree(place.root)
    allowed = WRITES[program] if program in trial.fine or trial.late else (LOCK,)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    outside = [name for name in changed if not name.startswith(allowed)]
    assert not outside, f"changed {outside}: {outcome}"
    return outcome


CASES = (
    Case(
        "hostile checkpoints",
        "one clear line or a harmless success; nothing run, written or read elsewhere, less than 1 GiB and 20 s",
        SAMPLE,
        len(ENTRIES) + SAMPLE,
        hostile,
    ),
)
