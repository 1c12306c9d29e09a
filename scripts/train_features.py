"""Train the feature network of a dataset, as shipped for digits and mnist in src/ddpm/evaluate/features/assets/.

Only the training images are used; the test images say how good the classifier is. Prints the hash that features.SHIPPED
must name. Where a machine's arithmetic differs, so will the last digits of the weights, and with them the hash.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter, process_time

import torch

from ddpm import __version__
from ddpm.data.datasets import DATASETS
from ddpm.errors import DataError
from ddpm.evaluate.features import extractor, training
from ddpm.io.cache import save_arrays
from ddpm.io.files import reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=sorted(set(DATASETS) - {"folder"}))
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("DDPM_DATA", "data")))
    parser.add_argument("--seed", type=int, default=extractor.SEED)
    parser.add_argument("--out", type=Path, help="file to write (default: that of the package)")
    args = parser.parse_args()
    out = args.out or extractor.ASSETS / f"{args.dataset}.safetensors"
    try:
        data = DATASETS[args.dataset](args.data_root)
        if data.notice:
            print(data.notice)
        start, cpu = perf_counter(), process_time()
        arrays = extractor.train(data, args.seed, torch.device("cpu"))
        seconds, cpu_seconds = perf_counter() - start, process_time() - cpu
        save_arrays(out, arrays)
        made = extractor.load(out, data.facts, torch.device("cpu"))
        start = perf_counter()
        probabilities = made.embed(data.test.images).probabilities
        embedding = perf_counter() - start
        assert probabilities is not None and data.test.labels is not None
        highest, guess = probabilities.max(dim=1)
        recipe = {
            "dataset": args.dataset,
            "training_images": len(data.train),
            "seed": args.seed,
            "version": extractor.RECIPE,
            **extractor.recipe(args.dataset)._asdict(),
            "batch_size": training.BATCH_SIZE,
            "dim": made.dim,
            "test_accuracy": round((guess == data.test.labels).double().mean().item(), 4),
            "test_confident": round((highest >= 0.95).double().mean().item(), 4),
            "ddpm": __version__,
            "torch": torch.__version__,
        }
        save_arrays(out, arrays, recipe=json.dumps(recipe))
    except DataError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or out}: {reason(error)}")
    print(json.dumps(recipe, indent=1))
    print(
        f"{seconds:.0f} s ({cpu_seconds:.0f} s of CPU); {len(data.test)} images embedded in {embedding:.1f} s"
    )
    print(f"{out}: {out.stat().st_size} bytes, content {made.sha256}")


if __name__ == "__main__":
    main()
