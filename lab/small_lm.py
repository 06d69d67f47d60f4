"""A folder that transformers loads, of the small language model of tinyllamas: `python lab/small_lm.py SOURCE FOLDER`.

In: a folder with `model.safetensors`, `config.json` and `tok512.json` (pieces with their scores, in the order of their
ids). Out: the same model with a `tokenizer.json`, as byte-pair merges in the order of the scores, with bytes where no
piece fits; which is what sentencepiece does with such a vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"


def merges(pieces: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every way to make a piece of two others, best score first."""
    found = []
    for piece in pieces:
        parts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += [(scores[piece], *part) for part in parts if part[0] in pieces and part[1] in pieces]
    found.sort(key=lambda each: (-each[0], pieces[each[1]], pieces[each[2]]))
    return [(left, right) for _, left, right in found]


def tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer."""
    rows = json.loads((source / "tok512.json").read_text(encoding="utf-8"))
    names = [*SPECIAL, *(piece.replace(" ", SPACE) for piece, _ in rows[len(SPECIAL) :])]
    ids = {name: i for i, name in enumerate(names)}
    scores = {name: score for name, (_, score) in zip(names, rows, strict=True)}
    whole = {name: i for name, i in ids.items() if name not in SPECIAL and not name.startswith("<0x")}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges(whole, scores), unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(args.source / name, args.folder / name)
    tokenizer(args.source).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
