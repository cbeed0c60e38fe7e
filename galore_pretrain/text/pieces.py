"""Build the tokenizers library's form of a SentencePiece model, which `transformers` loads from an exported folder.

transformers' own classes each assume how a model was trained: which ids the markers have, what becomes of a newline. So
the form is built from the model itself, which says all of that. It gives the ids of SentencePiece for all texts but
those in which combining marks stack up: the library normalizes a letter and its marks together, and loses marks where
the normalization replaces only some of them. So each export is tried on the run's own text before training.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

SPACE = "\u2581"
"""What SentencePiece writes for a space in a piece."""
OF_NO_PIECE = "\ue000"
"""A character for private use, beside which a text is tried."""
_UNIGRAM, _BPE, _WORD, _CHARACTER = range(1, 5)  # TrainerSpec.ModelType of sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.SentencePiece.Type


def fast_form(processor: "sentencepiece.SentencePieceProcessor") -> "tokenizers.Tokenizer":
    """Return a tokenizer with the ids of a SentencePiece model; its control pieces are special tokens.

    Raises ValueError for a model of whole words, which the library has no like of, and where protobuf is too old for
    the installed sentencepiece.
    """
    from tokenizers import AddedToken, Tokenizer

    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # protobuf has a class of its own for this
        raise ValueError(f"its file cannot be read: {error}") from error

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(processor.serialized_model_proto())
    kind = proto.trainer_spec.model_type
    if kind == _UNIGRAM:
        form = Tokenizer(_unigram(proto))
    elif kind in (_BPE, _CHARACTER):
        form = Tokenizer(_bpe(proto))
        form.pre_tokenizer = _user_defined_apart(proto)
    else:
        raise ValueError("its pieces are whole words")
    form.normalizer = _normalizer(proto.normalizer_spec)
    form.decoder = _decoder(proto.normalizer_spec)
    special = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    form.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    spelled = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN, _BYTE)]
    if kind == _UNIGRAM or _user_defined(proto):
        before = _taken_before(proto, {name[0] for name in spelled})
        cut_apart(form, {name: _first_part(processor, name, before) for name in spelled})
    form.encode_special_tokens = True
    return form


# What stands before a text may take its beginning: `▁<` may be a piece, and `<|` too. So the place to cut it is one
# between pieces wherever the text stands.
def _first_part(processor: "sentencepiece.SentencePieceProcessor", text: str, before: list[str]) -> int:
    """Return how many characters of ``text``, behind any of ``before``, make its first pieces; 1 if that varies."""
    common = set(range(1, len(text)))
    for head in before:
        spans = processor.encode(head + text, return_type="offset_mapping")["offsets"]
        common &= {start - len(head) for start, _ in spans}
    return min(common, default=1)


def _taken_before(proto: Any, firsts: set[str]) -> list[str]:
    """List what pieces join to the characters ``firsts``, what they join nothing to, a word's end, and nothing."""
    heads = {"", "a ", OF_NO_PIECE}
    for piece in proto.pieces:
        if piece.type != _NORMAL:
            continue
        for place, character in enumerate(piece.piece):
            if character in firsts:
                heads.add(piece.piece[:place].replace(SPACE, " "))
    return sorted(heads)


def cut_apart(form: "tokenizers.Tokenizer", tokens: Mapping[str, int]) -> None:
    """Let ``form`` cut ``tokens`` that a text spells in two, behind so many characters, so that it never makes them."""
    from tokenizers import Regex, pre_tokenizers

    rests: dict[str, list[str]] = {}
    for token, length in tokens.items():
        if len(token) > 1:
            rests.setdefault(re.escape(token[:length]), []).append(re.escape(token[length:]))
    if not rests:
        return
    patterns = [f"{first}(?={'|'.join(behind)})" for first, behind in rests.items()]
    cut = pre_tokenizers.Split(Regex("|".join(patterns)), "merged_with_previous")
    steps = [cut]
    if form.pre_tokenizer is not None:
        steps = [form.pre_tokenizer, cut]
    form.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _normalizer(spec: Any) -> Any:
    """Return what a model's NormalizerSpec does to a text, spaces included."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> Any:
    """Return what makes text of pieces again."""
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


# The library takes every piece of the vocabulary for an ordinary one; `cut_apart` keeps markers out of text. A piece
# that was set aside (unused) gets a name with a space, which no normalized text has. One that the user defined gets the
# score that SentencePiece gives it, whatever those of others are: it wins over most pieces that go across its ends.
def _unigram(proto: Any) -> Any:
    """Return the Unigram model with the pieces of ``proto``."""
    from tokenizers.models import Unigram

    vocabulary: list[tuple[str, float]] = []
    for number, piece in enumerate(proto.pieces):
        name, score = piece.piece, piece.score
        if piece.type == _USER_DEFINED:
            score = 0.1 * len(name.encode()) - 0.1
        elif piece.type == _UNUSED:
            name = f"<unused {number}>"
        vocabulary.append((name, score))
    return Unigram(vocabulary, _unknown(proto), byte_fallback=proto.trainer_spec.byte_fallback)


# SentencePiece joins the two neighbours whose piece has the best score. The library has an order of pairs instead: that
# of the pieces that they make. What the user defined is never joined: it is set apart, and then taken whole.
def _bpe(proto: Any) -> Any:
    """Return the BPE model with the pieces of ``proto``; for one of single characters, no two are joined."""
    from tokenizers.models import BPE

    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (_NORMAL, _UNUSED)}
    merges: list[tuple[str, str]] = []
    for name in sorted(scores, key=lambda name: -scores[name]):
        for cut in range(1, len(name)):
            if name[:cut] in scores and name[cut:] in scores:
                merges.append((name[:cut], name[cut:]))
    return BPE(
        {piece.piece: number for number, piece in enumerate(proto.pieces)},
        merges,
        unk_token=proto.pieces[_unknown(proto)].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        ignore_merges=bool(_user_defined(proto)),
    )


def _user_defined_apart(proto: Any) -> Any:
    """Return what sets the pieces that the user defined apart, so that nothing is joined to them; None without any."""
    from tokenizers import Regex, pre_tokenizers

    names = sorted(_user_defined(proto), key=len, reverse=True)
    if not names:
        return None
    pattern = "|".join(re.escape(name) for name in names)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _user_defined(proto: Any) -> list[str]:
    """List the pieces that the user defined."""
    return [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]


def _unknown(proto: Any) -> int:
    """Return the id of the unknown piece, which every model has."""
    return next(number for number, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
