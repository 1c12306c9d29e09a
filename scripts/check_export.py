"""A checkpoint and its export to diffusers, side by side: the same noise through both tools.

    python scripts/check_export.py ckpt [picture.png] [n]

Runs the installed ddpm-export, loads the folder with diffusers, draws n images (16) with both by DDIM, eta = 0, and
writes a picture: ours, diffusers', and the difference times 100. Exits with 1 where a pixel differs by more than one
grey level.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import torch

import ddpm
from ddpm.export import crosscheck
from ddpm.io.images import grid, save_png


def main() -> None:
    typed = sys.argv[1:]
    if not typed:
        sys.exit(__doc__)
    ckpt, picture, n = (
        typed[0],
        typed[1] if len(typed) > 1 else "export.png",
        int(typed[2]) if len(typed) > 2 else 16,
    )
    model = ddpm.load(ckpt, device="cpu")
    noise = torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % model.facts.num_classes if model.conditional else None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        result = subprocess.run(["ddpm-export", f"ckpt={ckpt}", f"out={out}"], capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(result.stderr)
        print(result.stdout.strip().splitlines()[-1])
        ours = crosscheck.ours(model, noise, labels)
        theirs = crosscheck.theirs(model, out, noise, labels)
    difference = (ours - theirs).abs()
    levels = abs(ddpm.to_uint8(ours).astype(int) - ddpm.to_uint8(theirs)).max()
    steps = crosscheck.ddim_as_exported(model).params["num_steps"]
    print(
        f"{n} images, DDIM with {steps} steps, diffusers {diffusers.__version__}: largest difference of a pixel "
        f"{difference.max():.1e} in [-1, 1], {levels} of 255 grey levels"
    )
    columns = torch.stack([ours, theirs, difference * 100 - 1], dim=1).flatten(0, 1)
    save_png(Path(picture), grid(ddpm.to_uint8(columns), nrow=12))
    print(picture)
    sys.exit(int(levels > 1))


if __name__ == "__main__":
    main()
