"""The loss that introductory notebooks quote, of a checkpoint: mean squared error in eps, uniform t, test images.

    python scripts/eps_loss.py ckpt [draws]

`draws` network evaluations (20,000), every test image at least once. A conditional model is asked with the labels, and
without any, as an unconditional one is. Data: $DDPM_DATA.
"""

import os
import sys

import ddpm
from ddpm import build
from ddpm.evaluate.metrics.likelihood import eps_loss


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    model = ddpm.load(sys.argv[1])
    data = build.dataset(model.config.dataset, os.environ.get("DDPM_DATA", "data"))
    draws = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    for labelled in (True, False) if model.conditional else (False,):
        loss = eps_loss(model, data.test, n_draws=draws, seed=0, labelled=labelled)
        how = "with labels" if labelled else "without labels"
        part = loss.error / loss.mean
        print(
            f"{how}: {loss.mean:.5f} ± {loss.error:.5f} ({part:.2%}), {loss.draws:,} draws of {loss.n:,} images"
        )


if __name__ == "__main__":
    main()
