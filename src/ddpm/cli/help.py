"""`--help`, printed without importing Hydra or torch."""

from ddpm.config.checking import declared, groups
from ddpm.config.choices import ADDED, CONFIG_DIR
from ddpm.config.schema import SCHEMAS

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


def show_help(program: str) -> None:
    """Print the help of a command."""
    keys, chosen = declared(SCHEMAS[program]), groups(SCHEMAS[program])
    print(_HEAD[program])
    for group in [*chosen, *["experiment"] * (program == "train")]:
        files = sorted((CONFIG_DIR / group).glob("*.yaml"))
        print(f"{group}=")
        for file in files:
            print(f"  {file.stem:<15} {_first_comment(file.read_text(encoding='utf-8'))}")
        for name in ADDED.get(group, {}):
            print(f"  {name:<15} (plug-in)")
    print("keys" + ", and group.key for every key of a chosen file (see --cfg job)" * bool(chosen))
    for key, value in _top_keys((CONFIG_DIR / f"{program}.yaml").read_text(encoding="utf-8")):
        print(f"  {key + '=' + value:<26} {keys[key].help}")
    print("\nflags")
    if program == "train":
        print(
            "  -m                 multirun: a,b makes a job each; run_dir=… goes on with it by the same command"
        )
        print("  hydra/launcher=joblib   several jobs at once; ddpm-report shows what came of them")
    print("  --cfg job          print the composed config and stop")
    print("  plugins=my_module  imports schedules, samplers and datasets of your own first")


def _first_comment(text: str) -> str:
    comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if "@package" not in comment), "")


def _top_keys(text: str) -> list[tuple[str, str]]:
    """Return the plain `key: value` lines of a command's YAML, with each value as it is written there."""
    pairs = [line.split(": ", 1) for line in text.splitlines() if line[:1].isalpha() and ": " in line]
    return [(key, "…" if value == "???" or "$" in value else value) for key, value in pairs]
