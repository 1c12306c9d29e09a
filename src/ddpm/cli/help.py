"""`--help`, printed without importing Hydra or torch."""

from ddpm.config.choices import ADDED, CONFIG_DIR

_HEAD = {
    "train": """ddpm-train: train a diffusion model on small images

  ddpm-train                                             scikit-learn's digits on a CPU, about two minutes
  ddpm-train dataset=mnist schedule=cosine
  ddpm-train -m schedule=linear,cosine optimizer.lr=1e-4,3e-4      a sweep
""",
    "sample": """ddpm-sample: draw images from a checkpoint, which holds all that is needed

  ddpm-sample ckpt=latest n=64
  ddpm-sample ckpt=outputs/train/2026-01-31/12-00-00 sampler=ddpm save=[grid,npz]
  ddpm-sample ckpt=latest label=all guidance_scale=2 n=100
  ddpm-sample ckpt=latest n=16 sampler.num_steps=20 save=[grid,trajectory] out=pictures
  ddpm-sample ckpt=latest task=inpaint input=my.png mask=left n=4
  ddpm-sample ckpt=latest task=variation input=mnist:test:0-7 strength=0.5
""",
    "eval": """ddpm-eval: how good a model's images are, or any others, beside what real images reach

  ddpm-eval ckpt=latest n=10000
  ddpm-eval ckpt=latest n=2000 sampler=ddim sampler.num_steps=20 measure=[distance,neighbours]
  ddpm-eval -m ckpt=latest sampler=ddim,dpmpp_2m,unipc sampler.num_steps=5,10,20,50      which sampler to take
  ddpm-eval samples=their-images.npz dataset=mnist
  ddpm-eval samples=mnist:train:0-9999
  ddpm-eval compare=[runs/a/evaluations/eval-1,runs/b/evaluations/eval-1]
""",
    "export": """ddpm-export: a checkpoint as a folder that other tools load, with a model card

  ddpm-export ckpt=latest out=my-model                       a pipeline of diffusers, ready to upload
  ddpm-export ckpt=outputs/train/2026-01-31/12-00-00 out=my-model ema=false
  ddpm-export ckpt=latest format=safetensors out=my-weights  weights and config alone
""",
    "info": """ddpm-info: what a checkpoint is, read from its header alone

  ddpm-info ckpt=latest
  ddpm-info ckpt=outputs/train/2026-01-31/12-00-00
  ddpm-info ckpt=outputs/train/2026-01-31/12-00-00/checkpoints/best.safetensors
""",
    "report": """ddpm-report: what came of a sweep, or of any runs: a table, report.csv, report.png and contact.png

  ddpm-report outputs/multirun/2026-01-31/12-00-00       also while the sweep is running
  ddpm-report runs/a runs/b out=comparison
  ddpm-report outputs/multirun/lr figure=val_loss sampler=ddim sampler.num_steps=20 n=16
""",
}
_GROUPS = {
    "train": ("dataset", "model", "schedule", "objective", "optimizer", "sampler", "trainer", "experiment"),
    "sample": ("sampler",),
    "eval": ("dataset", "sampler"),
    "export": (),
    "info": (),
    "report": ("sampler",),
}
NOTES = {
    "seed": "every random number follows from it",
    "device": "auto, cpu, cuda, cuda:1",
    "data_root": "folder of the datasets (default: $DDPM_DATA, else data)",
    "run_dir": "the run's folder (default: a new outputs/train/<date>/<time>)",
    "logger": "files, or tensorboard as well: event files in the run's folder",
    "overwrite": "replace a run that is there already",
    "gpus": "take a free GPU, no other run's: auto, or 0,2,3 to choose among; a sweep's default is auto",
    "jobs_per_gpu": "how many may share one; all of them must say so",
    "minimize": "what a sweep's jobs return and its table is sorted by: the lowest of a run",
    "ckpt": "a checkpoint file, a run folder, or latest",
    "n": "how many images: 64; of each input: 1; from end to end of an interpolation: 8",
    "index": "only this image of the seed (or a list; of the input): the same whatever n is",
    "batch_size": "how many at once",
    "precision": "the network's: fp32, or bf16, faster on a GPU, and on a CPU that has AMX",
    "label": "a class, a list [0,1,2], or all: image i has class i mod K",
    "guidance_scale": "1 is off; above 1 more typical of the class, 0 without class",
    "guidance_rescale": "0 to 1: back towards the contrast without guidance",
    "guidance_interval": "guide only where sigma/alpha is within [low, high]; null: everywhere",
    "task": "generate, inpaint, variation, interpolate or reconstruct",
    "input": "to start from: a picture, a folder of them, or mnist:test:0-15 (train, val, test)",
    "mask": "inpaint: left, top, centre, random, or a picture: what is white is drawn",
    "jump_length": "inpaint: levels between which RePaint goes to and fro",
    "jump_n_sample": "inpaint: how often; the cost is num_steps × jump_n_sample evaluations",
    "strength": "variation: 0 returns the input, 1 forgets it",
    "seeds": "interpolate: the two ends (default: seed and seed+1); with input: every two images",
    "ema": "averaged weights; false: the last ones",
    "save": "any of grid, images, npz, trajectory",
    "out": "folder for the results (of ddpm-sample by default a new one under the run's)",
    "format": "diffusers or safetensors",
    "nrow": "images in a row of the grid",
    "eval.dataset": "what they are held against (default: the checkpoint's own; needed for samples)",
    "eval.n": "how many images; distances from fewer than a few thousand say little",
    "eval.guidance_scale": "1 is off, as models are compared",
    "eval.out": "folder for the results (default: a new one under the run's, or under outputs/evaluations)",
    "samples": "instead of ckpt: an .npz file, a folder of pictures, or mnist:test, mnist:train:0-9999",
    "compare": "instead of either: evaluation.json files, or their folders, side by side",
    "measure": "any of distance, neighbours, memorization, likelihood, cas; what does not apply is left out",
    "report.folder": "a sweep, a run, or a folder of them; or a list; the key itself need not be typed",
    "report.figure": "what runs are ranked by, at its best over each run: val_eps_mse or val_loss",
    "report.contact": "false: no contact.png, which takes the longest",
    "report.n": "images of each run in contact.png, 1 to 64: the same noise for all",
    "report.sampler": "one for all runs (default: each run's own)",
    "report.out": "folder for the files (default: the folder itself; for several a new one)",
}


def show_help(program: str) -> None:
    print(_HEAD[program])
    for group in _GROUPS[program]:
        files = sorted((CONFIG_DIR / group).glob("*.yaml"))
        print(f"{group}=")
        for file in files:
            print(f"  {file.stem:<15} {_first_comment(file.read_text(encoding='utf-8'))}")
        for name in ADDED.get(group, {}):
            print(f"  {name:<15} (plug-in)")
    print(
        "keys"
        + (", and group.key for every key of a chosen file (see --cfg job)" if _GROUPS[program] else "")
    )
    for key, value in _top_keys((CONFIG_DIR / f"{program}.yaml").read_text(encoding="utf-8")):
        print(f"  {key + '=' + value:<26} {NOTES.get(f'{program}.{key}', NOTES.get(key, ''))}")
    print("\nflags")
    if program == "train":
        print(
            "  -m                 multirun: a,b makes a job each; run_dir=… to go on with it by the same command"
        )
        print("  hydra/launcher=joblib   several jobs at once; ddpm-report shows what came of them")
    print("  --cfg job          print the composed config and stop")
    print("  plugins=my_module  imports schedules, samplers and datasets of your own first")


def _first_comment(text: str) -> str:
    lines = [
        line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line
    ]
    return lines[0] if lines else ""


def _top_keys(text: str) -> list[tuple[str, str]]:
    """The plain `key: value` lines of a command's YAML; read by eye, since --help should not wait for a parser."""
    pairs = [line.split(": ", 1) for line in text.splitlines() if line[:1].isalpha() and ": " in line]
    return [(key, "…" if value == "???" or "$" in value else value) for key, value in pairs]
