"""Stop strings: the text is what it would be without them, cut where the first of them begins, whatever tokenizer and decoder wrote it."""

from __future__ import annotations

import functools
import random
import types

import dlm_fast
import pytest
import torch
from dlm_fast.loading import load_tokenizer
from dlm_fast.presets import PRESETS
from dlm_fast.requests import Requests, response
from dlm_fast.stops import Stopper, read_stop_strings
from dlm_kernels import RowState
from dlm_kernels.state import COMMIT, DENOISE, DONE
from helpers import EOS, MASK, VOCAB, options_of, random_prompts, row_of, toy, toy_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[MASK]", "[EOS]", "<|turn|>", "<|end|>"]


def tokenizer_of(pieces: list[str], decoder, *, merges: bool = False, clean: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that is only asked to decode: the special tokens are ids 0 to 3, then come the pieces."""
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    model = models.BPE(vocabulary, [], byte_fallback=True) if merges else models.WordLevel(vocabulary, unk_token=pieces[0])
    raw = Tokenizer(model)
    raw.decoder = decoder
    raw.add_tokens([AddedToken("<think>", special=False)])
    # "<|turn|>" and "<|end|>" are special without being anybody's EOS.
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[EOS]", mask_token="[MASK]", clean_up_tokenization_spaces=clean)


def byte_level() -> PreTrainedTokenizerFast:
    """As of Qwen and Llama 3: a character may be several tokens, and a token the end of one and the beginning of another."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = "".join(piece for piece, _ in split.pre_tokenize_str("a é€🦙ab"))
    rng = random.Random(0)
    pairs = {spelled[i : i + n] for i, n in ((rng.randrange(len(spelled) - 4), rng.randrange(2, 5)) for _ in range(40))}
    return tokenizer_of(sorted(alphabet | pairs), decoders.ByteLevel(), merges=True)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2: characters out of the vocabulary are runs of byte tokens, and a run that is no text is all replacements."""
    used = sorted({*"a\né€🦙".encode(), 0xFF})
    pieces = ["▁", "a", "▁a", "b", "▁ab", "ba", "é", "c", *(f"<0x{byte:02X}>" for byte in used)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return tokenizer_of(pieces, decoders.Sequence(steps), merges=True)


WORDS = ["a", "b", "n", "t", "'", ".", "s", "ve", "'s", "n't", "##t", "##s", "ab", "?", "!"]
TOKENIZERS = {
    "characters": lambda: tokenizer_of(list("ab \n.c"), decoders.Fuse()),
    "tiny-block": lambda: load_tokenizer("tiny-block"),
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "metaspace": lambda: tokenizer_of(["▁", "▁a", "a", "b", "▁ab", "ba"], decoders.Metaspace(prepend_scheme="first")),
    "word pieces": lambda: tokenizer_of(WORDS, decoders.WordPiece(prefix="##", cleanup=True)),
    "cleaned words": lambda: tokenizer_of(WORDS, decoders.WordPiece(prefix="##", cleanup=False), clean=True),
    "cleaned characters": lambda: tokenizer_of(list("  'a.nts,vermt"[1:]), decoders.Fuse(), clean=True),
    "suffixes": lambda: tokenizer_of(["a</w>", "a", "b</w>", "ba</w>", "c"], decoders.BPEDecoder(suffix="</w>")),
}


@functools.cache
def tokenizer(name: str):
    return TOKENIZERS[name]()


def random_ids(name: str, rng: random.Random, length: int) -> list[int]:
    """Ids without the mask; of byte vocabularies, pieces of a text now and then, so that characters are completed."""
    tok = tokenizer(name)
    special = sorted(special_ids(tok).values())
    plain = sorted(set(tok.get_vocab().values()) - set(special))
    ids = []
    while len(ids) < length:
        if rng.random() < 0.03:
            ids.append(rng.choice([id for id in special if id != tok.mask_token_id]))
        elif name.startswith("byte") and rng.random() < 0.7:
            character = rng.choice(["a", "é", "€", "🦙", "\n"])
            letters = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(character)[0][0] if name == "byte level" else ""
            ids += tok.convert_tokens_to_ids(list(letters) or [f"<0x{byte:02X}>" for byte in character.encode()])
        else:
            ids.append(rng.choice(plain))
    return ids[:length]


def special_ids(tok) -> dict[str, int]:
    return {token.content: id for id, token in tok.added_tokens_decoder.items() if token.special}


def random_stops(text: str, rng: random.Random, special: list[str]) -> list[str]:
    """Pieces of the text, some with an end that it does not go on with, some special tokens; in any order."""
    stops = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        start = rng.randrange(max(1, len(text)))
        piece = text[start : start + rng.choice([1, 1, 2, 3, 6])]
        stops.append(piece + rng.choice(["", "", "", "#", "a", "\n"]))
    stops = [s for s in stops if s and not any(token in s for token in special)] or ["a"]
    return stops + rng.choice([[], [], rng.sample(special, 1)])


def request(ids: list[int], stops, eos: tuple[int, ...], mask: int) -> Requests:
    """One row: a prompt of two tokens and as many masks as there are ids."""
    canvas = torch.tensor([5, 6] + [mask] * len(ids))
    return Requests(
        canvases=[canvas], prompt_lengths=[2], min_new_tokens=[0], temperature=[0.0], top_k=0, top_p=1.0, seed=0, request_ids=[0],
        stop_strings=stops, banned_token_ids=(), eos_token_ids=eos,
    )  # fmt: skip


def opened(batch: Requests) -> RowState:
    state = RowState.empty(1, len(batch.canvases[0]), "cpu")
    state.tokens[0], state.canvas_len[0], state.phase[0] = batch.canvases[0], len(batch.canvases[0]), DENOISE
    return state


def write(state: RowState, places: list[int], ids: list[int]) -> None:
    for place in places:
        state.tokens[0, 2 + place], state.unmask_step[0, 2 + place] = ids[place], 0


def cut(ids: list[int], tok, stops: list[str], eos: tuple[int, ...]) -> tuple[str, str]:
    """The text of ids that nothing interrupts, cut by hand; and why it ended."""
    by_id = {id for token, id in special_ids(tok).items() if token in stops}
    end = next((j for j, token in enumerate(ids) if token in eos or token in by_id), len(ids))
    finish = "length" if end == len(ids) else "eos" if ids[end] in eos else "stop"
    text = tok.decode(ids[:end], skip_special_tokens=True)
    places = [text.index(s) for s in stops if s in text]
    return (text[: min(places)], "stop") if places else (text, finish)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_row_that_a_stop_string_ended_early_has_the_uninterrupted_text_cut_at_the_first_one(name):
    tok, rng = tokenizer(name), random.Random(name)
    special = [token for token in special_ids(tok) if token != tok.mask_token]
    diffusion = types.SimpleNamespace(mask_token_id=tok.mask_token_id)
    early = stopped = 0
    for trial in range(250):
        ids = random_ids(name, rng, rng.choice([4, 12, 40]))
        eos = rng.choice([(), (tok.eos_token_id,)])
        stops = random_stops(tok.decode(ids, skip_special_tokens=True), rng, special)
        batch = request(ids, read_stop_strings(iter(stops), tok, diffusion.mask_token_id), eos, diffusion.mask_token_id)
        state, stopper = opened(batch), Stopper(batch, diffusion.mask_token_id, takes_back=False)

        order = list(range(len(ids)))
        if rng.random() < 0.5:
            rng.shuffle(order)
        while order and int(state.phase[0]) != DONE:
            taken = rng.choice([1, 1, 3])
            write(state, order[:taken], ids)
            order = order[taken:]
            stopper(state)
        got = response(batch, 0, state.tokens[0], state.unmask_step[0], tok, diffusion)

        where = f"trial {trial}: {stops} in {ids}"
        assert (got.text, got.finish) == cut(ids, tok, stops, eos), where
        # The ids are a beginning of those written, their text begins with the text, and equals it if that of any beginning does.
        kept = got.ids.tolist()
        assert kept == ids[: len(kept)] and tok.decode(kept, skip_special_tokens=True).startswith(got.text), where
        if any(tok.decode(ids[:n], skip_special_tokens=True) == got.text for n in range(len(ids) + 1)):
            assert tok.decode(kept, skip_special_tokens=True) == got.text, where
        early += bool(order)
        stopped += got.finish == "stop"
    assert stopped > 100 and early > 50
