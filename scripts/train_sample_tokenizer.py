#!/usr/bin/env python3
"""Train the tokenizer that ships for ``--data sample``: 1024 SentencePiece pieces on the sample's training speeches.

    python scripts/train_sample_tokenizer.py     # needs the extra ``sample``

Unigram with T5's ids (pad 0, eos 1, unk 2) and T5's normalization; 1024 pieces so that llama_1m spends its parameters
on matrices rather than on a vocabulary. Trained on the training split alone: validation text is unseen by it too.
"""

from pathlib import Path

import sentencepiece

from galore_pretrain.text.sources import sample_source

TARGET = Path(__file__).resolve().parent.parent / "galore_pretrain" / "tokenizers" / "sample"


def main() -> None:
    """Train on all documents and write the model where the package looks for it."""
    source = sample_source("train")
    documents = []
    for shard in range(len(source.shards)):
        for _, text in source.read(shard, 0):
            documents.append(text)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(TARGET),
        vocab_size=1024,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=1,
    )
    TARGET.with_suffix(".vocab").unlink()
    print(f"{TARGET}.model: 1024 pieces from {len(documents)} documents")


if __name__ == "__main__":
    main()
