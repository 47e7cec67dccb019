"""nanoGPT's checkpoint by our protocol: `python -m benchmarks.rescore --nanogpt CHECKOUT --data FOLDER`.

FOLDER has tinyshakespeare's input.txt; CHECKOUT has been trained on it by nanoGPT's own commands. What it prints is the
mean of nats over every character of the last tenth, in windows side by side, each predicted once; nanoGPT's own figure
is the mean over some random windows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import measure


def characters(text: str) -> np.ndarray:
    """nanoGPT's ids: places among the sorted characters of the whole text."""
    places = {character: place for place, character in enumerate(sorted(set(text)))}
    return np.array([places[character] for character in text])


@torch.no_grad()
def full_loss(model: torch.nn.Module, tokens: np.ndarray, context: int) -> float:
    """Nats per token."""
    total = 0.0
    for first in range(0, len(tokens) - 1, context):
        window = torch.tensor(tokens[first : first + context + 1])
        inputs, targets = window[None, :-1], window[1:]
        logits, _ = model(inputs, inputs)  # without targets it gives the last position alone
        total += F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
    return total / (len(tokens) - 1)


def main() -> None:
    """Score what training left in the checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    file = options.nanogpt / "out-shakespeare-char" / "ckpt.pt"
    kept = torch.load(file, map_location="cpu", weights_only=True)
    library = measure.module_of(options.nanogpt / "model.py", "nanogpt_model")
    model = library.GPT(library.GPTConfig(**kept["model_args"])).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in kept["model"].items()})
    tokens = characters((options.data / "input.txt").read_text())
    loss = full_loss(model, tokens[int(0.9 * len(tokens)) :], kept["model_args"]["block_size"])
    own = float(kept["best_val_loss"])
    print(f"full-validation loss {loss:.4f}; its own estimate {own:.4f}, after {kept['iter_num']} steps")


if __name__ == "__main__":
    main()
