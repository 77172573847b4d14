"""Semantic IDs for a catalogue of your own, in memory: texts, embeddings, IDs, a new item.

python examples/tokenize_catalogue.py                             # a small catalogue made up here
python examples/tokenize_catalogue.py --data FOLDER --out out/ids # items.csv[.gz], and embeddings.npy if there are any
"""

import argparse
from pathlib import Path

from vqkernels.data import embed_texts, load_folder
from vqkernels.semantic_ids import ResidualKMeansTokenizer, RQVAETokenizer, load_tokenizer

COLOURS = ("red", "blue", "green", "black", "white")
THINGS = (
    "running shoes",
    "rain jacket",
    "cast iron skillet",
    "chef's knife",
    "wireless headphones",
    "phone charger",
    "picture book for children",
    "cookbook",
    "garden hose",
    "watering can",
    "yoga mat",
    "tennis racket",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data folder (default: 60 items made up here)")
    parser.add_argument("--out", type=Path, default=Path("out/ids"), help="where the tokenizer is saved (out/ids)")
    parser.add_argument("--codebook-size", type=int, default=8, help="codewords a level (8)")
    args = parser.parse_args()

    embeddings = None
    if args.data:
        catalogue = load_folder(args.data, items_only=True)
        texts, embeddings = catalogue.item_texts, catalogue.embeddings
    else:
        texts = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
    # the text of an item that comes later is embedded along with the others, so that both models see it the same way
    vectors, made_by = (
        embed_texts([*texts, "purple running shoes"]) if embeddings is None else (embeddings, "from the data folder")
    )
    items = vectors[: len(texts)]
    print(f"{len(items)} items, embeddings {made_by}")

    for tokenizer in (
        ResidualKMeansTokenizer(levels=3, codebook_size=args.codebook_size),
        RQVAETokenizer(levels=3, codebook_size=args.codebook_size),
    ):
        report = tokenizer.fit(items).report()
        print(
            f"\n{tokenizer.kind}: {report['collision_rate']:.1%} of the items share their codes, largest group "
            f"{report['largest_group']}, usage {report['usage']}, {report['train_seconds']:.1f} s"
        )
        for item in range(0, len(items), max(1, len(items) // 6)):
            print(f"  {tokenizer.semantic_ids[item].tolist()}  {texts[item]}")
        folder = tokenizer.save(args.out / tokenizer.kind, overwrite=True)
        if len(vectors) > len(items):
            print(f"  {load_tokenizer(folder).encode(vectors[-1:])[0].tolist()}  purple running shoes (new)")
    print(f"\nsaved under {args.out}")


if __name__ == "__main__":
    main()
