"""Stop strings: the text is what it would be without them, cut where the first of them begins, whatever wrote the
text."""

from __future__ import annotations

import functools
import random
import types

import pytest
import torch
from helpers import EOS, MASK, facts_of, options_of, random_prompts, toy, toy_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dlm_fast
from dlm_fast import cli
from dlm_fast.loading import load_tokenizer
from dlm_fast.presets import PRESETS
from dlm_fast.requests import Requests, response
from dlm_fast.stopper import Stopper
from dlm_fast.stops import read_stop_strings
from dlm_kernels import RowState
from dlm_kernels.state import COMMIT, DENOISE, DONE

SPECIAL = ["[MASK]", "[EOS]", "<|turn|>", "<|end|>"]


def tokenizer_of(pieces: list[str], decoder, *, merges: bool = False, clean: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that is only asked to decode: the special tokens are ids 0 to 3, then come the pieces."""
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    model = (
        models.BPE(vocabulary, [], byte_fallback=True) if merges else models.WordLevel(vocabulary, unk_token=pieces[0])
    )
    raw = Tokenizer(model)
    raw.decoder = decoder
    raw.add_tokens([AddedToken("<think>", special=False)])
    # "<|turn|>" and "<|end|>" are special without being anybody's EOS.
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="[EOS]", mask_token="[MASK]", clean_up_tokenization_spaces=clean
    )


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer as of Qwen and Llama 3: a character may be several tokens, and a token the end of one character and
    the beginning of another."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = "".join(piece for piece, _ in split.pre_tokenize_str("a é€🦙ab"))
    rng = random.Random(0)
    pairs = {spelled[i : i + n] for i, n in ((rng.randrange(len(spelled) - 4), rng.randrange(2, 5)) for _ in range(40))}
    return tokenizer_of(sorted(alphabet | pairs), decoders.ByteLevel(), merges=True)


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as of Llama 2: characters that the vocabulary lacks are runs of byte tokens, and a run that is no
    text is all replacements."""
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
            letters = (
                pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(character)[0][0]
                if name == "byte level"
                else ""
            )
            ids += tok.convert_tokens_to_ids(list(letters) or [f"<0x{byte:02X}>" for byte in character.encode()])
        else:
            ids.append(rng.choice(plain))
    return ids[:length]


def special_ids(tok) -> dict[str, int]:
    return {token.content: id for id, token in tok.added_tokens_decoder.items() if token.special}


def random_stops(text: str, rng: random.Random, special: list[str]) -> list[str]:
    """Pieces of the text in any order: some have an end with which the text does not go on, and some are special
    tokens."""
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
        canvases=[canvas], opened=[canvas], prompt_lengths=[2], min_new_tokens=[0], request_ids=[0],
        temperature=[0.0], top_k=0, top_p=1.0, seeds=[0],
        stop_strings=[stops], banned_token_ids=(), eos_token_ids=eos,
    )  # fmt: skip


def opened(batch: Requests) -> RowState:
    state = RowState.empty(1, len(batch.canvases[0]), "cpu")
    state.tokens[0], state.canvas_len[0], state.phase[0] = batch.canvases[0], len(batch.canvases[0]), DENOISE
    return state


def write(state: RowState, places: list[int], ids: list[int]) -> None:
    for place in places:
        state.tokens[0, 2 + place], state.unmask_step[0, 2 + place] = ids[place], 0


def cut(ids: list[int], tok, stops: list[str], eos: tuple[int, ...]) -> tuple[str, str]:
    """The text of ids that nothing interrupts, cut by hand; and why the text ended."""
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
    for trial in range(120):
        ids = random_ids(name, rng, rng.choice([4, 12, 40]))
        eos = rng.choice([(), (tok.eos_token_id,)])
        stops = random_stops(tok.decode(ids, skip_special_tokens=True), rng, special)
        batch = request(ids, read_stop_strings(iter(stops), tok, diffusion.mask_token_id), eos, diffusion.mask_token_id)
        state, stopper = opened(batch), Stopper.of(batch, diffusion.mask_token_id, takes_back=False)

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
        # The ids are a beginning of those written, their text begins with the text, and equals it if that of any
        # beginning does.
        kept = got.ids.tolist()
        assert kept == ids[: len(kept)] and tok.decode(kept, skip_special_tokens=True).startswith(got.text), where
        if any(tok.decode(ids[:n], skip_special_tokens=True) == got.text for n in range(len(ids) + 1)):
            assert tok.decode(kept, skip_special_tokens=True) == got.text, where
        early += bool(order)
        stopped += got.finish == "stop"
    assert stopped > 50 and early > 20


@pytest.mark.parametrize("name", TOKENIZERS)
def test_settled_text_stays_whatever_follows(name):
    tok, rng = tokenizer(name), random.Random(name)
    stops = read_stop_strings(["a"], tok, tok.mask_token_id)
    vocabulary = sorted(set(tok.get_vocab().values()) - {tok.mask_token_id})
    for _ in range(40):
        ids = random_ids(name, rng, rng.randrange(8))
        settled = stops.settled(ids)
        assert tok.decode(ids, skip_special_tokens=True).startswith(settled)
        for later in [[token] for token in vocabulary] + [random_ids(name, rng, 3) for _ in range(20)]:
            assert tok.decode(ids + later, skip_special_tokens=True).startswith(settled), f"{ids} and then {later}"


@pytest.mark.parametrize(
    "name, pieces, more, settled",
    [
        ("characters", ["a", "b"], ["."], "ab"),
        ("byte level", ["a", "â", "Ĥ"], ["¬"], "a"),  # two bytes of three
        ("byte level", ["a", "â", "<|turn|>", "Ĥ"], ["¬"], "a"),
        ("byte fallback", ["a", "<0x0A>"], ["<0xF0>"], "a"),  # a newline until a byte follows that begins no character
        ("byte fallback", ["a", "<0x0A>", "<|turn|>"], ["<0xF0>"], "a"),
        ("byte fallback", ["a", "<0x0A>", "b"], ["<0xF0>"], "a\nb"),
        ("cleaned characters", ["a", " ", "n", "'"], ["t"], "a"),  # "a n't" is written "an't"
        ("cleaned characters", ["a", " ", "'", " "], ["."], ""),  # "a'" becomes "a '."
    ],
)
def test_what_a_later_token_may_change_is_not_settled(name, pieces, more, settled):
    tok = tokenizer(name)
    stops = read_stop_strings(["a"], tok, tok.mask_token_id)
    ids = tok.convert_tokens_to_ids(pieces)
    assert stops.settled(ids) == settled
    assert tok.decode(ids + tok.convert_tokens_to_ids(more), skip_special_tokens=True).startswith(settled)


DECODERS = [(preset, {}) for preset in PRESETS if PRESETS[preset].supported]
DECODERS += [
    ("rcr", {"cache": "prefix"}),
    ("rcr", {"cache": "dual"}),
    ("sdar", {"policies": [dlm_fast.policies.RunningConfidence()], "stop": "after_block"}),
    ("llada2.1", {"cache": "none", "max_post_edits": 3}),
    ("llada2.2", {"max_post_edits": 2}),
]


@pytest.mark.parametrize(
    "preset, options", DECODERS, ids=[" ".join([name, *map(str, more.values())])[:40] for name, more in DECODERS]
)
def test_every_decoder_gives_the_uninterrupted_text_cut_at_the_stop_string(preset, options):
    model, tok = toy(PRESETS[preset].visibility, **facts_of(preset)), toy_tokenizer()
    settings = {"preset": preset, "max_new_tokens": 16, "tokenizer": tok, **options_of(preset), **options}
    prompts, early = random_prompts([3, 5, 4]), 0
    whole = dlm_fast.generate(model, prompts, **settings)
    for places in ((1, 4), (6, 8), (9, 11)):
        stops = [text[slice(*places)] or "#" for text in whole.text]
        out = dlm_fast.generate(model, prompts, stop_strings=stops, **settings)
        for b, text in enumerate(whole.text):
            found = [text.index(s) for s in stops if s in text]
            assert out.text[b] == (text[: min(found)] if found else text)
            assert out.finish[b] == ("stop" if found else whole.finish[b])
            assert tok.decode(out.sequences[b], skip_special_tokens=True) == out.text[b]
            early += out.nfe[b] < whole.nfe[b]
    assert early or PRESETS[preset].schedule == "canvas" and MASK not in whole.canvas[0]


@pytest.mark.parametrize("takes_back", [False, True])
def test_only_what_the_decoder_can_no_longer_change_ends_a_row(takes_back):
    tok = toy_tokenizer()
    ids = tok("abcdefgh")["input_ids"]
    batch = request(ids, read_stop_strings(["cd"], tok, MASK), (), MASK)
    state, stopper = opened(batch), Stopper.of(batch, MASK, takes_back)
    state.block_start[0], state.block_end[0] = 2, 6

    write(state, [3, 2, 1], ids)
    stopper(state)
    assert int(state.phase[0]) == DENOISE  # nothing is decided behind a mask
    write(state, [0], ids)
    stopper(state)
    assert int(state.phase[0]) == (DENOISE if takes_back else DONE)
    state.phase[0] = COMMIT  # the block is finished
    stopper(state)
    assert int(state.phase[0]) == (DONE if takes_back else COMMIT)


@pytest.mark.parametrize("stops", [["cd", "ab"], ["ab", "cd"]])
def test_the_earliest_of_several_stop_strings_cuts_whatever_their_order(stops):
    tok = toy_tokenizer()
    ids = tok("xxabyycd")["input_ids"]
    batch = request(ids, read_stop_strings(stops, tok, MASK), (), MASK)
    state = opened(batch)
    write(state, range(8), ids)
    got = response(batch, 0, state.tokens[0], state.unmask_step[0], tok, types.SimpleNamespace(mask_token_id=MASK))
    assert (got.text, got.ids.tolist(), got.finish) == ("xx", ids[:2], "stop")


def test_a_string_that_ends_first_waits_for_one_that_began_before_it():
    tok = toy_tokenizer()
    stops = read_stop_strings(["b", "abcz", "bc"], tok, MASK)
    assert [stops.decided(text) for text in ("xa", "xab", "xabc", "xabcz", "xabd", "xb")] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]
    assert [stops.find(text) for text in ("xa", "xab", "xabc", "xabcz", "xabd", "xb")] == [None, 2, 2, 1, 2, 1]


def test_a_special_token_is_found_by_its_id_and_an_eos_stays_one():
    model, tok = toy("full", eos=()), toy_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight[2:].mean(0) * 40  # it is written somewhere
    settings = {"max_new_tokens": 24, "tokenizer": tok, "block_length": 4}
    prompts = random_prompts([3, 7, 5, 9, 2])
    whole = dlm_fast.generate(model, prompts, **settings)
    out = dlm_fast.generate(model, prompts, stop_strings=["[EOS]"], **settings)
    first = [row.tolist().index(EOS) if EOS in row else None for row in whole.sequences]
    assert any(place for place in first)
    for b, place in enumerate(first):
        assert out.sequences[b].tolist() == whole.sequences[b].tolist()[:place]
        assert out.text[b] == tok.decode(whole.sequences[b][:place], skip_special_tokens=True)
        assert out.finish[b] == ("length" if place is None else "stop")
    ended = dlm_fast.generate(model, prompts, stop_strings=["[EOS]"], eos_token_ids=[EOS], **settings)
    assert ended.finish == ["length" if place is None else "eos" for place in first]


def test_an_added_token_that_text_shows_is_found_in_the_text():
    tok = tokenizer("characters")
    ids = tok.convert_tokens_to_ids(["a", "b", "<think>", "c"])
    for stop, text in {"<think>": "ab", "b<think>": "a", "think": "ab<", ">c": "ab<think"}.items():
        batch = request(ids, read_stop_strings([stop], tok, tok.mask_token_id), (), tok.mask_token_id)
        state = opened(batch)
        write(state, range(len(ids)), ids)
        got = response(
            batch, 0, state.tokens[0], state.unmask_step[0], tok, types.SimpleNamespace(mask_token_id=tok.mask_token_id)
        )
        assert (got.text, got.finish) == (text, "stop")
        # "ab<" is spelled by the token that goes on with "think>".
        assert got.ids.tolist() == ids[: {"a": 1, "ab": 2}.get(text, 3)]


@pytest.mark.parametrize(
    "stop, message",
    [
        (
            "[EOS]\n",
            r"must not hold a special token beside other text, which leaves it out, got '\[EOS\]\\n' with '\[EOS\]'",
        ),
        ("a[MASK]", r"must not hold a special token beside other text"),
        ("[MASK]", r"must be what can be written, got the mask token '\[MASK\]'"),
    ],
)
def test_a_stop_string_that_no_text_can_hold_is_refused(stop, message):
    with pytest.raises(ValueError, match="generate: stop_strings " + message):
        dlm_fast.generate(toy("full"), ["a"], tokenizer=toy_tokenizer(), stop_strings=["b", stop])


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **kwargs)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", ["characters", "byte level", "tiny-block"])
def test_a_step_decodes_new_tokens_and_a_window_not_the_whole_text(name, ends):
    tok = Counting(tokenizer(name))
    diffusion = types.SimpleNamespace(mask_token_id=tok.mask_token_id)
    ids = random_ids(name, random.Random(0), 1000)
    stop = "\x00 never \x00"
    stops = read_stop_strings([stop, "[EOS]"] if name != "tiny-block" else [stop], tok, diffusion.mask_token_id)
    ids = [id for id in ids if id not in stops.ids]
    batch = request(ids, stops, (), diffusion.mask_token_id)
    state, stopper = opened(batch), Stopper.of(batch, diffusion.mask_token_id, takes_back=False)
    for place in range(len(ids)):
        write(state, [place], ids)
        stopper(state)
    assert tok.decoded <= len(ids) * (4 * len(stop) + 9)

    tok.decoded = 0
    text = tok.tokenizer.decode(ids, skip_special_tokens=True)
    if ends:
        batch = request(
            ids, read_stop_strings([text[-1], text[-9:]], tok, diffusion.mask_token_id), (), diffusion.mask_token_id
        )
    response(batch, 0, state.tokens[0], state.unmask_step[0], tok, diffusion)
    assert tok.decoded <= len(ids) * (3 + 11)  # the text, and a binary search over its beginnings


def test_a_window_that_begins_inside_a_character_finds_nothing_that_the_text_has_not():
    tok = Counting(tokenizer("byte level"))
    (llama,) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🦙")
    ids = tok.convert_tokens_to_ids(list(llama[0]) * 200)
    batch = request(ids, read_stop_strings(["\ufffd🦙"], tok, tok.mask_token_id), (), tok.mask_token_id)
    state, stopper = opened(batch), Stopper.of(batch, tok.mask_token_id, takes_back=False)
    for place in range(len(ids)):
        write(state, [place], ids)
        stopper(state)
    assert int(state.phase[0]) == DENOISE and tok.decoded <= len(ids) * (4 * 2 + 9)


def test_the_command_line_cuts_as_generate_does(capsys):
    model = dlm_fast.load("tiny-block", device="cpu")
    chat = [{"role": "user", "content": "Sort 52 17 80 33 61"}]
    whole, out = (
        dlm_fast.generate(model, [chat], max_new_tokens=32, stop_strings=stops) for stops in ((), [" 80", " 61"])
    )
    argv = [
        "generate",
        "--model",
        "tiny-block",
        "--device",
        "cpu",
        "--prompt",
        chat[0]["content"],
        "--max-new-tokens",
        "32",
    ]
    assert cli.main([*argv, "--stop-string", " 80", "--stop-string", " 61"]) == 0
    assert out.text[0] + "\n" == capsys.readouterr().out
    assert out.text[0] == whole.text[0].split(" 61")[0] and out.finish == ["stop"]
