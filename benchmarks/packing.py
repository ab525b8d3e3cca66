"""What a step would pay for covariances that are kept as triangles: unpacked, accumulated, and packed again.

    python benchmarks/packing.py

Milliseconds of CPU time on one thread, the least of some rounds in turn. ``accumulate`` is SOAP's update of one square
factor from a square gradient; ``packed`` is the same between `steepest.linalg.packed`'s two conversions.
"""

from __future__ import annotations

import argparse
import time

import torch

from steepest.linalg.packed import packed as pack
from steepest.linalg.packed import unpacked as unpack
from steepest.linalg.symmetric import accumulate_gram

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="256,512,1024,2048", help="rows of a factor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n{'side':>6}{'accumulate':>12}{'packed':>10}{'ratio':>8}")
    for d in map(int, args.sides.split(",")):
        G = torch.randn(1, d, d, generator=torch.Generator().manual_seed(0))
        K = G @ G.mT
        triangle = pack(K)

        def whole(K: torch.Tensor = K, G: torch.Tensor = G) -> None:
            accumulate_gram(K, G, 0.95)

        def packed(triangle: torch.Tensor = triangle, G: torch.Tensor = G) -> None:
            K = unpack(triangle, G.shape[-1])
            accumulate_gram(K, G, 0.95)
            triangle.copy_(pack(K))

        best = dict.fromkeys((whole, packed), float("inf"))
        for _ in range(ROUNDS):
            for call in best:
                start = time.thread_time()
                call()
                best[call] = min(best[call], 1e3 * (time.thread_time() - start))
        print(f"{d:6}{best[whole]:12.2f}{best[packed]:10.2f}{best[packed] / best[whole]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
