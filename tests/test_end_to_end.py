"""The real console scripts, from an empty folder: train, resume, sample, info, sweep."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_script

pytestmark = pytest.mark.xdist_group("end_to_end")  # one worker, which makes its fixtures once
QUICK = [
    "model.channels=[16,32]",
    "trainer.batch_size=32",
    "trainer.log_every=4",
    "trainer.validate_every=8",
    "trainer.checkpoint_every=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which 16 steps were trained into `outputs/train/…`."""
    folder = tmp_path_factory.mktemp("home")
    result = run_script("train", *QUICK, "trainer.max_steps=16", cwd=folder, real=True)
    assert result.returncode == 0, result.stderr
    assert "experiment=" not in result.stdout and "about " in result.stdout
    # plain lines, as this is no terminal
    assert "\r" not in result.stdout + result.stderr and "\x1b" not in result.stdout + result.stderr
    (run,) = (folder / "outputs" / "train").glob("*/*")
    assert result.stdout.splitlines()[-1] == f"next: ddpm-sample ckpt={run.relative_to(folder)}"
    return run


def home(run: Path) -> Path:
    return run.parents[3]


def test_run_folder_holds_what_is_promised(run: Path) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names == {
        ".lock",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "train.log",
        "result.json",
        "loss.png",
        "forward.png",
        "schedule.png",
        "samples/step_0000016.png",
        "checkpoints/best.safetensors",
        "checkpoints/step_0000008.safetensors",
        "checkpoints/step_0000016.safetensors",
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [4, 8, 12, 16]
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= records[0].keys()
    assert {"val_loss", "val_eps_mse", "val_eps_mse_error"} <= records[-1].keys()


def test_sample_writes_what_is_asked(run: Path) -> None:
    result = run_script(
        "sample",
        "ckpt=latest",
        "n=5",
        "batch_size=2",
        "sampler.num_steps=4",
        "save=[grid,images,npz,trajectory]",
        "out=drawn",
        cwd=home(run),
        real=True,
    )
    assert result.returncode == 0, result.stderr
    drawn = home(run) / "drawn"
    assert [Path(line).name for line in result.stdout.split()] == [
        "grid.png",
        "images",
        "samples.npz",
        "trajectory.gif",
        "trajectory.png",
        "sample.json",
    ]
    images = np.load(drawn / "samples.npz", allow_pickle=False)["images"]
    assert images.shape == (5, 8, 8) and images.dtype == np.uint8 and images.std() > 0
    for i in range(5):
        assert (np.asarray(Image.open(drawn / "images" / f"{i:05d}.png")) == images[i]).all()
    about = json.loads((drawn / "sample.json").read_text())
    assert (
        about["sampler"] == {**about["sampler"], "name": "dpmpp_2m_sde", "num_steps": 4}
        and about["step"] == 16
    )


def test_sample_takes_files_folders_and_other_samplers(run: Path) -> None:
    for arguments in (
        ["ckpt=" + str(run)],
        ["ckpt=" + str(run / "checkpoints" / "best.safetensors"), "sampler=ddpm", "ema=false"],
    ):
        result = run_script("sample", *arguments, "n=2", "sampler.num_steps=3", cwd=home(run))
        assert result.returncode == 0, result.stderr
        assert (home(run) / result.stdout.splitlines()[0]).name == "grid.png"
    assert {path.name for path in (run / "samples").iterdir() if path.is_dir()} >= {"drawn-1", "drawn-2"}


def test_image_i_is_the_same_whatever_is_drawn_beside_it(run: Path) -> None:
    def drawn(*arguments: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        result = run_script(
            "sample",
            "ckpt=latest",
            "sampler.num_steps=5",
            "save=[npz]",
            "out=seeds",
            *arguments,
            cwd=home(run),
        )
        assert result.returncode == 0, result.stderr
        images = np.load(home(run) / "seeds" / "samples.npz")["images"].astype(np.int64)
        shutil.rmtree(home(run) / "seeds")
        return images

    whole = drawn("n=6")
    assert abs(whole - drawn("n=6", "batch_size=4")).max() <= 1  # float32 sums in another order
    assert abs(whole[[5, 2]] - drawn("index=[5,2]")).max() <= 1
    assert abs(whole[:3] - drawn("n=3")).max() <= 1 and abs(whole - drawn("n=6", "seed=1")).max() > 100


def test_sample_refuses_more_steps_than_there_are(run: Path) -> None:
    result = run_script("sample", "ckpt=latest", "sampler.num_steps=1001", cwd=home(run))
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "num_steps" in result.stderr
        and "1000" in result.stderr
    )


def test_info_reads_the_header_alone(run: Path) -> None:
    result = run_script("info", f"ckpt={run}", cwd=home(run), real=True, PYTHONPROFILEIMPORTTIME="1")
    assert "| torch\n" not in result.stderr
    for words in (
        "digits, 8×8×1, 10 classes",
        "linear",
        "predicts eps",
        "16 of 16 steps",
        "val_eps_mse",
        "torch 2.",
    ):
        assert words in result.stdout


def test_resume_goes_on_and_refuses_another_network(run: Path) -> None:
    here = home(run)
    other = run_script(
        "train", f"trainer.resume={run}", "model.channels=[16,64]", "trainer.max_steps=20", cwd=here
    )
    assert other.returncode == 2 and "model.channels was [16, 32], is [16, 64]" in other.stderr
    done = run_script("train", f"trainer.resume={run}", cwd=here)
    assert done.returncode == 2 and "give trainer.max_steps a larger number" in done.stderr
    more = run_script("train", f"trainer.resume={run}", "trainer.max_steps=20", cwd=here)
    assert more.returncode == 0 and "going on from step 16" in more.stdout, more.stderr
    assert (run / "checkpoints" / "step_0000020.safetensors").exists()


def test_a_run_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in ("false", "true"):
        result = run_script("train", "run_dir=mine", f"overwrite={overwrite}", cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
