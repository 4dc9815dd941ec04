"""What a base sets limits to: ids within its embedding, lengths within its positions."""

from __future__ import annotations

from typing import Any

from fedlora.core.errors import ConfigError, ModelError


def pad_token_id(tokenizer: Any, rows: int) -> int:
    """What fills rows, which no loss counts and no token sees: an id that the embedding has.

    Args:
        rows: of the embedding.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in candidates if i is not None and 0 <= i < rows), 0)


def check_ids(tokenizer: Any, rows: int) -> str:
    """Confirms that every id which this tokenizer can give has a row of the embedding; says what was done about padding.

    Raises:
        ModelError: one has none.
    """
    pad = tokenizer.pad_token_id
    outside = {name: i for name, i in tokenizer.get_vocab().items() if not 0 <= i < rows}
    named = {role: i for role in ("bos", "eos") if (i := getattr(tokenizer, f"{role}_token_id")) is not None and i >= rows}
    if named or set(outside.values()) - {pad}:
        some = ", ".join(f"{role.upper()} {i}" for role, i in named.items()) or f"id {max(outside.values())}"
        raise ModelError(
            f"the tokenizer gives ids that are not among the {rows} of the base's embedding: {some} ({len(outside)} in all)",
            hint="take tokenizer and weights from one revision; added tokens need an embedding that was resized and trained",
        )
    if outside:
        return (
            f"padding has id {pad}, outside the embedding of {rows}: rows are filled with {pad_token_id(tokenizer, rows)} instead"
        )
    return f"all {len(tokenizer.get_vocab())} ids lie inside the embedding of {rows}"


def check_length(model: Any, max_length: int) -> str:
    """Confirms that rows of this length are within what the base computes; says what bounds them.

    Args:
        model: transformers' model.

    Raises:
        ConfigError: they are longer.
    """
    config = model.config.get_text_config()
    longest = next((n for n in (getattr(config, k, None) for k in _POSITIONS) if type(n) is int and n > 0), None)
    if longest is not None and max_length > longest:
        raise ConfigError(f"max_length {max_length} exceeds this base's {longest} positions", hint="use a smaller max_length")
    original = _changes_beyond(config, longest)
    if original is not None and max_length > original:
        raise ConfigError(
            f"max_length {max_length} exceeds the {original} tokens up to which this base's angles are the same for every row: "
            "beyond, those of one row follow from the longest of its batch",
            hint=f"use a max_length of at most {original}",
        )
    return f"rows of {max_length} tokens" + (f" of {longest} positions" if longest is not None else "")


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")


def _changes_beyond(config: Any, longest: int | None) -> int | None:
    """The length from which on the angles of positions depend on the longest row of a batch; None: they never do."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = str(scaling)
    if "longrope" not in kinds and "dynamic" not in kinds:
        return None
    given = scaling.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(given) if given else longest
