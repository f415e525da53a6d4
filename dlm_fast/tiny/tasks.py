"""Nine small synthetic tasks whose answers a program can check.

Each prompt starts with the keyword of its task:

    add      Add 398 and 904                -> 8+4+0=12; 9+0+1=10; 3+9+1=13 #### 1302
    word     Story Tom has 8 apples. ...    -> Tom starts with 8. Tom wins 5, so 8+5=13. ... #### 5
    trace    Run z=13; j=z-8; t=j-1; t?     -> z=13; j=13-8=5; t=5-1=4 #### 4
    kv       Map mint=36 gray=92 Find gray  -> gray=92
    sort     Sort 52 17 80                  -> 17 52 80
    sudoku   Sudoku 1.3. ..12 .... 432.     -> 1234 3412 2143 4321
    calc     Calc 13-9 9+4                  -> 13-9=4 9+4=13
    reverse  Reverse oak plum mint          -> mint plum oak
    shuffle  Shuffle oak plum mint          -> any order of the same words

The tasks differ in how far the tokens of an answer depend on one another, which parallel decoding has to respect. The
answer to `reverse` is known from the start; `add` and `word` are chains; `shuffle` has many answers, so that tokens
which are picked independently of one another repeat words. `kv` asks for its keys in the map's order.

A sample is held out if crc32 of its content is 0 modulo 50. The content leaves out what does not make a sample new (the
order of a list to sort, the owner of the apples), so that no training sample is a reordered held-out sample. Of sudoku
prompts are held out, and not grids, since there are only 288 grids.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Tom", "Ann", "Max", "Eva", "Sam", "Lia")
OBJECTS = ("apples", "coins", "cards", "books", "pens", "shells")
GAIN_VERBS = ("wins", "finds", "buys")
LOSS_VERBS = ("loses", "gives", "sells")
# Sixteen words for lists and maps. In a head of 32 dimensions rotary positions leave about 16 dimensions alone over a
# prompt's length, so more words would have to share directions, and looking words up is learned late as it is.
LIST_WORDS = tuple("mint gray plum oak pink blue rose gold fern moss sand rain leaf lime navy teal".split())
# Words that no task draws, which are in the vocabulary for a user's own prompts.
SPARE_WORDS = tuple("corn salt fish bird wolf bear frog lamp door ship bell drum kite star moon ring".split())
KEYWORDS = ("Add", "Story", "Map", "Sort", "Calc", "Reverse", "Shuffle", "Run", "Sudoku")
OTHER_WORDS = ("and", "Find", "has", "more", "How", "many", "now", "starts", "with", "so")

# Every word the tasks use; the tokenizer gives each a token of its own.
WORDS = KEYWORDS + OTHER_WORDS + NAMES + OBJECTS + GAIN_VERBS + LOSS_VERBS + LIST_WORDS + SPARE_WORDS

VARIABLES = "abcdjkmnptxyz"  # names of variables in trace

HELD_OUT_MODULUS = 50
MAX_VALUE = 20  # largest operand and result in word, trace and calc, small enough to be known by heart


@dataclass(frozen=True)
class Sample:
    """One prompt with a correct answer.

    Attributes:
        task: name of the task.
        prompt: the prompt.
        answer: a correct answer, and the only one unless the task is shuffle.
    """

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of prompts.

    Attributes:
        name: the task's name.
        weight: the task's share of training samples.
        new_prompt: draws a prompt from a generator.
        solve: gives the answer to a prompt.
        content: gives the canonical text of a prompt, which decides whether the sample is held out.
        new_easy_prompt: draws a smaller prompt than those that are evaluated; None = the task has none. A model learns
            to look a word up among many words far sooner if some examples have few words.
    """

    name: str
    weight: float
    new_prompt: Callable[[random.Random], str]
    solve: Callable[[str], str]
    content: Callable[[str], str]
    new_easy_prompt: Callable[[random.Random], str] | None = None

    def generate(self, rng: random.Random, *, easy: bool = False) -> Sample:
        """A sample of either split; an easy one if `easy` is set and the task has easy prompts."""
        prompt = self._draw(rng, easy)
        return Sample(self.name, prompt, self.solve(prompt))

    def check(self, prompt: str, response: str) -> bool:
        """Whether `response`, less surrounding whitespace, is the answer to `prompt`."""
        return response.strip() == self.solve(prompt)

    def _draw(self, rng: random.Random, easy: bool) -> str:
        return (self.new_easy_prompt if easy and self.new_easy_prompt else self.new_prompt)(rng)


@dataclass(frozen=True)
class ShuffleTask(Task):
    """The task with many correct answers: every order of the prompt's words is one."""

    def generate(self, rng: random.Random, *, easy: bool = False) -> Sample:
        """A sample of either split, its answer drawn uniformly from all orders."""
        prompt = self._draw(rng, easy)
        words = prompt.split()[1:]
        return Sample(self.name, prompt, " ".join(rng.sample(words, len(words))))

    def check(self, prompt: str, response: str) -> bool:
        """Whether `response` holds the prompt's words, each once, one space apart."""
        return sorted(response.strip().split(" ")) == sorted(prompt.split()[1:])


def is_held_out(sample: Sample) -> bool:
    """Whether a sample belongs to the held-out split: about one in fifty does."""
    content = f"{sample.task} {TASKS[sample.task].content(sample.prompt)}"
    return zlib.crc32(content.encode()) % HELD_OUT_MODULUS == 0


def generate_sample(task: str, rng: random.Random, split: str = "train", *, easy: bool = False) -> Sample:
    """A random sample of `task` from `split`, "train" or "held_out"; an easy one as in `Task.generate`."""
    if task not in TASKS:
        raise ValueError(f"tasks: task must be one of {', '.join(TASKS)}, got task={task!r}")
    if split not in ("train", "held_out"):
        raise ValueError(f"tasks: split must be 'train' or 'held_out', got split={split!r}")
    while True:
        sample = TASKS[task].generate(rng, easy=easy)
        if is_held_out(sample) == (split == "held_out"):
            return sample


def held_out(task: str, n: int, seed: int = 0) -> list[Sample]:
    """`n` held-out samples of `task` with different contents; `seed` decides which ones."""
    if n < 0:
        raise ValueError(f"tasks: n must be at least 0, got n={n}")
    rng = random.Random(f"held out {task} {seed}")
    samples: dict[str, Sample] = {}
    attempts = 0
    while len(samples) < n:
        sample = generate_sample(task, rng, "held_out")
        samples.setdefault(TASKS[task].content(sample.prompt), sample)
        attempts += 1
        # The tasks add, word and calc have only some hundreds to thousands of held-out contents.
        if attempts > 100 * n + 1000:
            raise ValueError(f"tasks: n must not exceed the held-out contents of {task}, got n={n}")
    return list(samples.values())


def _add_prompt(rng: random.Random) -> str:
    def operand() -> int:
        digits = rng.randint(2, 4)
        return rng.randrange(10 ** (digits - 1), 10**digits)

    return f"Add {operand()} and {operand()}"


def _add_operands(prompt: str) -> list[str]:
    return re.findall(r"\d+", prompt)


def _add_solve(prompt: str) -> str:
    left, right = _add_operands(prompt)
    width = max(len(left), len(right))
    carry = 0
    columns = []
    for a, b in zip(reversed(left.zfill(width)), reversed(right.zfill(width)), strict=True):
        total = int(a) + int(b) + carry
        columns.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return f"{'; '.join(columns)} #### {int(left) + int(right)}"


def _add_content(prompt: str) -> str:
    return " ".join(sorted(_add_operands(prompt)))


def _word_prompt(rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    value = rng.randint(2, MAX_VALUE - 2)
    sentences = [f"Story {name} has {value} {thing}."]
    for _ in range(rng.randint(2, 3)):
        gains = rng.random() < 0.5
        if value == 0 or value == MAX_VALUE:
            gains = value == 0
        if gains:
            amount = rng.randint(1, MAX_VALUE - value)
            sentences.append(f"{name} {rng.choice(GAIN_VERBS)} {amount} more.")
            value += amount
        else:
            amount = rng.randint(1, value)
            sentences.append(f"{name} {rng.choice(LOSS_VERBS)} {amount}.")
            value -= amount
    return f"{' '.join(sentences)} How many {thing} now?"


def _word_steps(prompt: str) -> tuple[str, int, list[tuple[str, int]]]:
    """Name, first amount, and (verb, amount) of each step of a word prompt."""
    match = re.match(r"Story (\w+) has (\d+)", prompt)
    if match is None:
        raise ValueError(f"tasks: prompt must be a word prompt, got prompt={prompt!r}")
    verbs = "|".join(GAIN_VERBS + LOSS_VERBS)
    steps = [(verb, int(amount)) for verb, amount in re.findall(rf"({verbs}) (\d+)", prompt)]
    return match[1], int(match[2]), steps


def _word_solve(prompt: str) -> str:
    name, value, steps = _word_steps(prompt)
    sentences = [f"{name} starts with {value}."]
    for verb, amount in steps:
        sign = "+" if verb in GAIN_VERBS else "-"
        result = value + amount if sign == "+" else value - amount
        sentences.append(f"{name} {verb} {amount}, so {value}{sign}{amount}={result}.")
        value = result
    return f"{' '.join(sentences)} #### {value}"


def _word_content(prompt: str) -> str:
    """The arithmetic alone, since another name or verb does not make a new sample."""
    _, value, steps = _word_steps(prompt)
    return f"{value}" + "".join(f"{'+' if verb in GAIN_VERBS else '-'}{amount}" for verb, amount in steps)


def _trace_prompt(rng: random.Random) -> str:
    """A prompt in which every assignment reads the variable of the assignment before.

    A trained model answered none of 24 prompts in which an assignment read an earlier variable.
    """
    count = rng.randint(3, 5)
    names = rng.sample(VARIABLES, count)
    values = [rng.randint(1, MAX_VALUE - 1)]
    statements = [f"{names[0]}={values[0]}"]
    for index in range(1, count):
        value = values[-1]
        if value == 0 or (value < MAX_VALUE and rng.random() < 0.5):
            amount = rng.randint(1, MAX_VALUE - value)
            statements.append(f"{names[index]}={names[index - 1]}+{amount}")
            values.append(value + amount)
        else:
            amount = rng.randint(1, value)
            statements.append(f"{names[index]}={names[index - 1]}-{amount}")
            values.append(value - amount)
    return f"Run {'; '.join(statements)}; {names[-1]}?"


def _trace_solve(prompt: str) -> str:
    *statements, query = prompt.removeprefix("Run ").split("; ")
    values: dict[str, int] = {}
    lines = []
    for statement in statements:
        name, expression = statement.split("=")
        source, sign, amount = re.fullmatch(r"(?:([a-z])([+-]))?(\d+)", expression).groups()
        values[name] = int(amount) if source is None else values[source] + int(sign + amount)
        lines.append(f"{name}={amount}" if source is None else f"{name}={values[source]}{sign}{amount}={values[name]}")
    return f"{'; '.join(lines)} #### {values[query[0]]}"


def _trace_content(prompt: str) -> str:
    """The statements with numbered variables, since other names do not make a new sample."""
    number: dict[str, str] = {}
    return re.sub(r"[a-z]", lambda match: number.setdefault(match[0], f"v{len(number)}"), prompt.removeprefix("Run "))


def _kv_prompt(rng: random.Random) -> str:
    keys = rng.sample(LIST_WORDS, rng.randint(5, 12))
    return _kv_map(rng, keys, rng.randint(3, 4))


def _kv_easy_prompt(rng: random.Random) -> str:
    keys = rng.sample(LIST_WORDS, rng.randint(2, 5))
    return _kv_map(rng, keys, rng.randint(1, min(3, len(keys))))


def _kv_map(rng: random.Random, keys: list[str], queries: int) -> str:
    pairs = " ".join(f"{key}={rng.randint(10, 99)}" for key in keys)
    # The prompt asks for keys in the map's order. With keys in any order, models this small soon learn which values are
    # wanted, but learn late which value belongs to which key: from step 1,450 to step 2,050 of a run like ours, the
    # share of correct tokens stayed at 0.80.
    asked = sorted(rng.sample(keys, queries), key=keys.index)
    return f"Map {pairs} Find {' '.join(asked)}"


def _kv_parts(prompt: str) -> tuple[list[str], list[str]]:
    pairs, queries = prompt.removeprefix("Map ").split(" Find ")
    return pairs.split(), queries.split()


def _kv_solve(prompt: str) -> str:
    pairs, queries = _kv_parts(prompt)
    value_of = dict(pair.split("=") for pair in pairs)
    return " ".join(f"{key}={value_of[key]}" for key in queries)


def _kv_content(prompt: str) -> str:
    pairs, queries = _kv_parts(prompt)
    return f"{' '.join(sorted(pairs))} ? {' '.join(sorted(queries))}"


def _calc_prompt(rng: random.Random) -> str:
    facts = []
    for _ in range(rng.randint(3, 6)):
        low, high = sorted((rng.randint(0, MAX_VALUE), rng.randint(0, MAX_VALUE)))
        if rng.random() < 0.5:
            facts.append(f"{high}-{low}")
        else:
            left, right = rng.sample((low, high - low), 2)
            facts.append(f"{left}+{right}")
    return f"Calc {' '.join(facts)}"


def _calc_solve(prompt: str) -> str:
    answers = []
    for fact in prompt.split()[1:]:
        left, sign, right = re.split(r"([+-])", fact)
        answers.append(f"{fact}={int(left) + int(sign + right)}")
    return " ".join(answers)


def _sort_prompt(rng: random.Random) -> str:
    return "Sort " + " ".join(str(rng.randint(10, 99)) for _ in range(rng.randint(5, 8)))


@functools.cache
def _grids() -> tuple[str, ...]:
    """The 288 solutions of the 4x4 sudoku, each row by row."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    found = []
    for grid in itertools.product(rows, repeat=4):
        columns_differ = all(len(set(column)) == 4 for column in zip(*grid))
        if columns_differ and all(
            len(set(grid[r][c : c + 2] + grid[r + 1][c : c + 2])) == 4 for r in (0, 2) for c in (0, 2)
        ):
            found.append("".join(grid))
    return tuple(found)


@functools.cache
def _grids_with(cell: int, digit: str) -> int:
    """The grids that have `digit` in `cell`, one bit per grid."""
    return sum(1 << number for number, grid in enumerate(_grids()) if grid[cell] == digit)


def _sudoku_fits(cells: str) -> int:
    """The grids that agree with `cells`, which are 16 digits or dots; one bit per grid."""
    fits = (1 << len(_grids())) - 1
    for cell, digit in enumerate(cells):
        if digit != ".":
            fits &= _grids_with(cell, digit)
    return fits


def _sudoku_rows(cells: str) -> str:
    return " ".join(cells[start : start + 4] for start in range(0, 16, 4))


def _sudoku_prompt(rng: random.Random) -> str:
    """A prompt with five to nine empty cells that exactly one grid fits."""
    while True:
        cells = list(rng.choice(_grids()))
        for cell in rng.sample(range(16), rng.randint(5, 9)):
            cells[cell] = "."
        if _sudoku_fits("".join(cells)).bit_count() == 1:
            return f"Sudoku {_sudoku_rows(''.join(cells))}"


def _sudoku_solve(prompt: str) -> str:
    fits = _sudoku_fits("".join(prompt.split()[1:]))
    return _sudoku_rows(_grids()[fits.bit_length() - 1])


def _words_prompt(keyword: str, low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: f"{keyword} {' '.join(rng.sample(LIST_WORDS, rng.randint(low, high)))}"


def _sorted_items(prompt: str) -> str:
    return " ".join(sorted(prompt.split()[1:]))


def _reverse_solve(prompt: str) -> str:
    return " ".join(reversed(prompt.split()[1:]))


def _first_order(prompt: str) -> str:
    return prompt.split(" ", 1)[1]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", 0.10, _add_prompt, _add_solve, _add_content),
        Task("word", 0.09, _word_prompt, _word_solve, _word_content),
        Task("trace", 0.13, _trace_prompt, _trace_solve, _trace_content),
        Task("kv", 0.24, _kv_prompt, _kv_solve, _kv_content, _kv_easy_prompt),
        Task("sort", 0.13, _sort_prompt, _sorted_items, _sorted_items),
        Task("sudoku", 0.09, _sudoku_prompt, _sudoku_solve, _first_order),
        Task("calc", 0.12, _calc_prompt, _calc_solve, _sorted_items),
        Task("reverse", 0.03, _words_prompt("Reverse", 5, 8), _reverse_solve, _sorted_items),
        ShuffleTask(
            "shuffle", 0.07, _words_prompt("Shuffle", 5, 8), _first_order, _sorted_items, _words_prompt("Shuffle", 2, 4)
        ),
    )
}
