"""The synthetic tasks: their answers, their checks, and the wall between what is trained on and what is held out."""

import random

import pytest

from dlm_fast.tiny.tasks import LIST_WORDS, TASKS, WORDS, Sample, generate_sample, held_out, is_held_out

WORKED = {
    "add": ("Add 398 and 904", "8+4+0=12; 9+0+1=10; 3+9+1=13 #### 1302"),
    "word": (
        "Story Tom has 8 apples. Tom wins 5 more. Tom sells 9. How many apples now?",
        "Tom starts with 8. Tom wins 5, so 8+5=13. Tom sells 9, so 13-9=4. #### 4",
    ),
    "trace": ("Run z=13; j=z-8; t=j-1; t?", "z=13; j=13-8=5; t=5-1=4 #### 4"),
    "kv": ("Map mint=36 gray=92 plum=64 Find gray plum", "gray=92 plum=64"),
    "sort": ("Sort 52 17 80 17", "17 17 52 80"),
    "sudoku": ("Sudoku 1.3. ..12 .... 432.", "1234 3412 2143 4321"),
    "calc": ("Calc 13-9 9+4", "13-9=4 9+4=13"),
    "reverse": ("Reverse oak plum mint", "mint plum oak"),
    "shuffle": ("Shuffle oak plum mint", "plum mint oak"),
}


def samples_of(task: str, n: int, split: str = "train") -> list[Sample]:
    rng = random.Random(f"test {task} {split}")
    return [generate_sample(task, rng, split) for _ in range(n)]


@pytest.mark.parametrize("task", TASKS)
def test_worked_example_is_accepted(task):
    prompt, answer = WORKED[task]

    assert TASKS[task].check(prompt, answer)
    assert TASKS[task].check(prompt, f" {answer}\n")


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_passes_its_own_check(task):
    for split in ("train", "held_out"):
        for sample in samples_of(task, 100, split):
            assert TASKS[task].check(sample.prompt, sample.answer), sample


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_fail(task):
    for sample in samples_of(task, 100):
        words = sample.answer.split(" ")
        wrong = [
            "",
            sample.answer[:-1],
            sample.answer + "1",
            sample.answer + " " + words[-1],
            " ".join(words[:-1]),
            " ".join(words[:-1] + words[:1]),  # the last word lost, the first said twice
            sample.answer.replace(" ", "  ", 1),
        ]
        # A list whose first and last item are equal survives that exchange.
        wrong = [response for response in wrong if response != sample.answer]
        assert not any(TASKS[task].check(sample.prompt, response) for response in wrong), sample


def test_any_order_of_the_words_is_a_shuffle_but_not_a_reversal():
    words = ["oak", "plum", "mint", "rose", "moss"]
    rng = random.Random(0)
    for _ in range(20):
        response = " ".join(rng.sample(words, len(words)))
        assert TASKS["shuffle"].check("Shuffle oak plum mint rose moss", response)
    assert not TASKS["reverse"].check("Reverse oak plum mint rose moss", " ".join(words))


def test_shuffle_trains_on_every_order_of_a_list():
    rng = random.Random(0)
    task = TASKS["shuffle"]
    first_word_rank = [
        sample.prompt.split()[1:].index(sample.answer.split()[0]) for sample in (task.generate(rng) for _ in range(400))
    ]

    assert all(first_word_rank.count(rank) > 30 for rank in range(5))


@pytest.mark.parametrize("task", TASKS)
def test_train_never_has_the_content_of_a_held_out_sample(task):
    content = TASKS[task].content
    kept_apart = {content(sample.prompt) for sample in held_out(task, 100)}

    assert len(kept_apart) == 100
    assert all(is_held_out(sample) for sample in held_out(task, 100))
    assert not kept_apart & {content(sample.prompt) for sample in samples_of(task, 2000)}


@pytest.mark.parametrize(
    ("task", "one", "other"),
    [
        ("add", "Add 398 and 904", "Add 904 and 398"),
        ("kv", "Map oak=12 mint=34 Find mint oak", "Map mint=34 oak=12 Find oak mint"),
        ("sort", "Sort 52 17 80", "Sort 80 52 17"),
        ("calc", "Calc 13-9 9+4", "Calc 9+4 13-9"),
        ("reverse", "Reverse oak mint", "Reverse mint oak"),
        ("shuffle", "Shuffle oak mint", "Shuffle mint oak"),
        (
            "word",
            "Story Tom has 8 apples. Tom wins 5 more. Tom sells 9. How many apples now?",
            "Story Ann has 8 pens. Ann buys 5 more. Ann gives 9. How many pens now?",
        ),
    ],
)
def test_reordering_or_renaming_does_not_make_new_content(task, one, other):
    assert TASKS[task].content(one) == TASKS[task].content(other)


def test_held_out_samples_depend_on_the_seed_alone():
    assert held_out("kv", 20, seed=3) == held_out("kv", 20, seed=3)
    assert held_out("kv", 20, seed=3) != held_out("kv", 20, seed=4)
    assert held_out("kv", 30, seed=3)[:20] == held_out("kv", 20, seed=3)


def test_sizes_cover_what_the_tasks_promise():
    operands = {len(number) for sample in samples_of("add", 300) for number in sample.prompt.split()[1::2]}
    pairs = {sample.prompt.count("=") for sample in samples_of("kv", 500)}
    queries = {sample.answer.count("=") for sample in samples_of("kv", 300)}
    facts = {sample.answer.count("=") for sample in samples_of("calc", 300)}
    steps = {sample.answer.count("so") for sample in samples_of("word", 300)}

    assert operands == {2, 3, 4}
    assert pairs == set(range(5, 13))
    assert queries == {3, 4}
    assert facts == {3, 4, 5, 6}
    assert steps == {2, 3}
    for task in ("sort", "reverse", "shuffle"):
        assert {len(sample.prompt.split()) - 1 for sample in samples_of(task, 300)} == {5, 6, 7, 8}


@pytest.mark.parametrize("task", ["kv", "shuffle"])
def test_easy_samples_are_right_smaller_and_never_held_out(task):
    rng = random.Random(0)
    samples = [generate_sample(task, rng, easy=True) for _ in range(200)]

    smallest = min(len(sample.prompt.split()) for sample in samples_of(task, 200))
    for sample in samples:
        assert len(sample.prompt.split()) < smallest + 2
        assert TASKS[task].check(sample.prompt, sample.answer)
        assert not is_held_out(sample)


def test_first_word_names_the_task():
    first_words = {task: {sample.prompt.split()[0] for sample in samples_of(task, 20)} for task in TASKS}

    assert all(len(words) == 1 for words in first_words.values())
    assert len(set.union(*first_words.values())) == len(TASKS)


def test_words_are_distinct():
    assert len(set(WORDS)) == len(WORDS)
    assert len(LIST_WORDS) >= 12  # the longest map


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="task must be one of add, .* got task='subtract'"):
        generate_sample("subtract", random.Random(0))
    with pytest.raises(ValueError, match="split must be .* got split='test'"):
        generate_sample("add", random.Random(0), "test")
    with pytest.raises(ValueError, match="n must be at least 0, got n=-1"):
        held_out("add", -1)
