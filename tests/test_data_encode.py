"""A row becomes tokens; what is supervised, and what the teacher reads, is exactly what should be."""

import copy
import json

import pytest
from datasets import Dataset
from helpers import EOS, config, first, make_tokenizer, messages, rollout_row
from tokenizers.processors import TemplateProcessing

from sekd.data.batch import Sample, collate
from sekd.data.encode import EncodeOptions, _format_prefix, set_eos
from sekd.data.load import load_rows
from sekd.data.prepare import logger, prepare


def test_prompt_and_completion(tokenizer):
    sample = first([{"prompt": "w1 w2", "completion": "w3 w4 w5", "other": 1}], tokenizer)
    assert sample == Sample([1, 2, 3, 4, 5, EOS], [0, 0, 1, 1, 1, 1], 0, 2)
    assert first([{"prompt": "w1", "completion": "w3"}], tokenizer, supervise_prompt=True).supervised == [1, 1, 1]


def test_other_columns_and_a_template(tokenizer):
    rows = [{"question": "w1", "answer": "w2"}]
    sample = first(
        rows, tokenizer, prompt_column="question", completion_column="answer", prompt_template="w9 {prompt} w8"
    )
    assert sample == Sample([9, 1, 8, 2, EOS], [0, 0, 0, 1, 1], 0, 3)


def test_text_prompts_as_a_chat(tokenizer):
    rows = [{"prompt": "w1", "completion": "w2"}]
    sample = first(rows, tokenizer, use_chat_template=True, system_prompt="w7")
    # <system> w7 <user> w1 <assistant> | w2 <eos>
    assert sample == Sample([125, 7, 123, 1, 124, 2, EOS], [0, 0, 0, 0, 0, 1, 1], 0, 5)


def test_conversational_prompt_and_completion(tokenizer):
    row = {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2"}]}
    assert first([row], tokenizer) == Sample([123, 1, 124, 2, EOS], [0, 0, 0, 1, 1], 0, 3)


def test_all_assistant_turns_of_a_conversation_are_targets(tokenizer):
    row = messages(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5"))
    sample = first([row], tokenizer)
    assert sample.input_ids == [123, 1, 124, 2, EOS, 123, 3, 124, 4, 5, EOS]
    assert sample.supervised == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert sample.prompt_length == 8


def test_answers_that_the_template_rewrites_later_are_no_targets(tokenizer):
    """As Qwen3 does: the last answer carries a thinking part, which earlier ones lose."""
    qwen = copy.deepcopy(tokenizer)
    thinking = "{% if m.role == 'assistant' and loop.last %}w77 {% endif %}{{ m.content }}"
    qwen.chat_template = tokenizer.chat_template.replace("{{ m.content }} <eos>", thinking + " <eos>")
    row = messages(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    sample = first([row], qwen)
    assert sample.input_ids == [123, 1, 124, 2, EOS, 123, 3, 124, 77, 4, EOS]
    assert sample.supervised == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert sample.input_ids[: sample.prompt_length] == [123, 1, 124, 2, EOS, 123, 3, 124]


def test_what_the_template_writes_after_the_end_is_not_supervised(tokenizer):
    trailing = copy.deepcopy(tokenizer)
    trailing.chat_template = trailing.chat_template.replace("<eos>{% endgeneration %}", "<eos>{% endgeneration %} w99")
    assert first([messages(("user", "w1"), ("assistant", "w2"))], trailing).input_ids == [123, 1, 124, 2, EOS]


def make_turn_tokenizer():
    """Its chat template ends turns with another token than EOS, as that of Qwen's base models does."""
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<turn_end>"]})
    made.chat_template = made.chat_template.replace("<eos>{% endgeneration %}", "<turn_end>{% endgeneration %} w99")
    return made


ONE_TURN = messages(("user", "w1"), ("assistant", "w2"))


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (ONE_TURN, {}),
        ({"prompt": "w1", "completion": "w2"}, dict(use_chat_template=True)),
        ({"prompt": "w1"}, dict(use_chat_template=True, lmbda=1.0)),
        ({"prompt": ONE_TURN["messages"][:1]}, dict(lmbda=1.0)),
    ],
)
def test_turns_that_end_with_another_token_than_eos(caplog, row, options):
    other, plain = make_turn_tokenizer(), make_tokenizer()
    first([row], plain, **options)
    assert "EOS" not in caplog.text
    logger.warning_once.cache_clear()
    first([row], other, **options)
    assert "ends answers with '<turn_end>', but the tokenizer's EOS token is '<eos>', so EOS is never" in caplog.text
    caplog.clear()
    set_eos(other, config(eos="<turn_end>"))
    sample = first([row], other, **options)
    # vLLM in an earlier test of this process leaves a process group, of which transformers warns.
    assert not [record for record in caplog.records if record.name.startswith("sekd")]
    if not options:
        assert sample.input_ids == [123, 1, 124, 2, other.eos_token_id]
        assert sample.supervised == [0, 0, 0, 1, 1]


def test_an_eos_token_must_be_a_token(tokenizer):
    with pytest.raises(ValueError, match="eos '<end>' is not a token of the student's tokenizer"):
        set_eos(tokenizer, config(eos="<end>"))


def test_a_prompt_for_generation_that_an_answer_does_not_begin_with(caplog):
    """Templates of thinking models begin the answer for the model; on-policy nothing else follows the prompt."""
    thinking = make_turn_tokenizer()
    thinking.chat_template = thinking.chat_template.replace("%}<assistant> {%", "%}<assistant> w77 {%")
    logger.warning_once.cache_clear()
    row = {"prompt": ONE_TURN["messages"][:1]}
    assert first([row], thinking, lmbda=1.0).input_ids == [123, 1, 124, 77]
    assert "ends answers with '<turn_end>'" in caplog.text
    row = {"prompt": ONE_TURN["messages"]}
    assert first([row], make_tokenizer(), lmbda=1.0).input_ids == [123, 1, 124, 2, EOS, 124]


def test_turns_that_end_without_any_special_token(tokenizer, caplog):
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = tokenizer.chat_template.replace(" <eos>", "")
    logger.warning_once.cache_clear()
    first([ONE_TURN], endless)
    assert "neither with the EOS token '<eos>' nor with another special token" in caplog.text


def test_an_eos_that_the_tokenizer_adds_is_left_out():
    """Before a completion it would end the prompt, and after a document there is one already."""
    plain, with_eos = make_tokenizer(), make_tokenizer()
    with_eos.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    assert with_eos("w1")["input_ids"] == [1, EOS]
    pair = {"prompt": "w1 w2", "completion": "w3"}
    for row, options in (
        (pair, dict(teacher_prompt_prefix="w9 ")),
        ({"prompt": "w1 <eos>", "completion": "w3"}, {}),
        ({"text": "w1 w2 w3"}, {}),
        ({"text": "w1 w2 w3"}, dict(text_prompt_length=1, teacher_prompt_prefix="w9 ")),
        (ONE_TURN, {}),
    ):
        assert first([row], with_eos, **options) == first([row], plain, **options)


def test_messages_of_sharegpt(tokenizer):
    turns = [("human", "w1"), ("gpt", "w2"), ("human", "w3"), ("gpt", "w4")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    ours = messages(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    assert first([row], tokenizer, messages_column="conversations") == first([ours], tokenizer)
    with pytest.raises(ValueError, match=r"its columns are 'conversations'. Set the field to one of them, or convert"):
        first([row], tokenizer)


@pytest.mark.parametrize("column", ["messages", "prompt", "completion"])
@pytest.mark.parametrize("bad", [[], [{"text": "w1"}], [{"role": None, "content": "w1"}]])
def test_messages_that_are_none(tokenizer, column, bad):
    row = {"prompt": ONE_TURN["messages"][:1], "completion": ONE_TURN["messages"][1:], column: bad}
    if column == "messages":
        row = {"messages": bad}
    with pytest.raises(ValueError, match=rf"column '{column}' holds .*, which is not a (list of messages|message)"):
        first([row], tokenizer, system_prompt="w7")


# Text whose first tokens are prompts


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_the_first_tokens_of_a_document_are_its_prompt(tokenizer, lmbda):
    row, options = {"text": "w1 w2 w3 w4 w5"}, dict(lmbda=lmbda, text_prompt_length=2)
    assert first([row], tokenizer, **options) == Sample([1, 2, 3, 4, 5, EOS], [0, 0, 1, 1, 1, 1], 0, 2)
    limits = dict(max_length=4, max_prompt_length=8)  # which is no limit here: all prompts have 2 tokens
    assert first([row], tokenizer, **options, **limits) == Sample([1, 2, 3, 4], [0, 0, 1, 1], 0, 2)
    if lmbda < 1:
        assert first([row], tokenizer, **options, supervise_prompt=True).supervised == [1] * 6
    pair = {"prompt": "w1 w2 w3", "completion": "w4"}
    assert first([pair], tokenizer, **options) == first([pair], tokenizer, lmbda=lmbda)


def test_text_on_policy_needs_a_length_for_its_prompts(tokenizer):
    with pytest.raises(ValueError, match=r"lmbda 0.5 needs prompts, .* \(text_column 'text'\): set text_prompt_length"):
        first([{"text": "w1"}], tokenizer, lmbda=0.5)
    with pytest.raises(ValueError, match="max_length 2 leaves no room after a text_prompt_length of 2; raise"):
        first([{"text": "w1"}], tokenizer, lmbda=1.0, max_length=2, text_prompt_length=2)


# Rollouts that were recorded before


def test_rollouts_are_taken_as_they_are(tmp_path, tokenizer):
    rows = [
        rollout_row([1, 2], [3, 4, EOS], sample_id=17, step=3, weights_step=3, finish_reason="stop"),
        rollout_row([5], [6, 7], sample_id=4, step=4, weights_step=3, finish_reason="length"),
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for supervise_prompt in (False, True):
        args = config(supervise_prompt=supervise_prompt)
        samples = [Sample(**row) for row in prepare(load_rows(str(tmp_path / "rollouts.jsonl")), tokenizer, args)]
        assert samples == [Sample([1, 2, 3, 4, EOS], [0, 0, 1, 1, 1], 0, 2), Sample([5, 6, 7], [0, 1, 1], 1, 1)]
    bare = {"prompt_ids": [1], "completion_ids": [2, 200]}  # models pad their vocabularies
    assert first([bare], tokenizer).input_ids == [1, 2, 200]


def test_rollouts_carry_the_teachers_prompts(tokenizer):
    rows = [rollout_row([1], [2], teacher_prompt_ids=[9, 1]), rollout_row([1], [3], teacher_prompt_ids=None)]
    found = [row["teacher_prompt_ids"] for row in prepare(Dataset.from_list(rows), tokenizer, config())]
    assert found == [[9, 1], None]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert [row["teacher_prompt_ids"] for row in prepare(stream, tokenizer, config())] == found
    args = config(teacher_prompt_prefix="w9 ")
    assert prepare(Dataset.from_list(rows[:1]), tokenizer, args)[0]["teacher_prompt_ids"] == [9, 1]
    with pytest.raises(
        ValueError, match="teacher_prompt_prefix cannot be added to the tokens of a rollout, and the rollouts lack"
    ):
        prepare(Dataset.from_list(rows), tokenizer, args)
    with pytest.raises(
        ValueError, match=r"teacher_cache 'c' holds the teacher's distributions after .* or drop that column"
    ):
        first(rows, tokenizer, teacher_cache="c")
    with pytest.raises(ValueError, match="'teacher_prompt_ids' is empty in a row"):
        first([rollout_row([1], [2], teacher_prompt_ids=[])], tokenizer)


def test_rollouts_of_another_tokenizer_or_without_token_ids(tokenizer):
    with pytest.raises(
        ValueError, match="with another tokenizer, or changed since: the completion_ids of a row decode to 'w3'"
    ):
        first([{**rollout_row([1], [3]), "completion": "w4"}], tokenizer)
    with pytest.raises(ValueError, match="the prompt_ids of a row decode to 'w1 w2', and its prompt is 'w1 w5'; set m"):
        first([{**rollout_row([1, 2], [3]), "prompt": "w1 w5"}], tokenizer)
    for bad in ([-1], [1.5], ["w1"], [True], None):
        for column in ("prompt_ids", "completion_ids"):
            with pytest.raises(ValueError, match=rf"column '{column}' holds .*, which is not a token id"):
                first([{**rollout_row([1], [2]), column: bad}], tokenizer)


# What a user can get wrong


def test_missing_columns_are_named_beside_those_there_are(tokenizer):
    with pytest.raises(ValueError, match=r"lacks completion_column: 'completion'; its columns are 'prompt', 'answer'"):
        first([{"prompt": "w1", "answer": "w2"}], tokenizer)
    with pytest.raises(ValueError, match=r"prompt_column: 'prompt' or .* or text_column: 'text'; its columns are 'x'"):
        first([{"x": "w1"}], tokenizer)
    with pytest.raises(ValueError, match=r"text_column: 'text'; its columns are 'x'"):
        first([{"x": "w1"}], tokenizer, lmbda=1.0)


def test_on_policy_needs_no_completions(tokenizer):
    assert first([{"prompt": "w1 w2"}], tokenizer, lmbda=1.0).input_ids == [1, 2]


def test_cells_that_are_not_text(tokenizer):
    for row in ({"prompt": 3, "completion": "w1"}, {"prompt": "w1", "completion": None}):
        with pytest.raises(ValueError, match=r"column '(prompt|completion)' holds (3|None), which is not text"):
            first([row], tokenizer)


def test_a_tokenizer_without_eos(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        first([{"text": "w1"}], endless)


def test_a_conversation_needs_a_chat_template_and_an_answer(tokenizer):
    with pytest.raises(ValueError, match="has no assistant turn"):
        first([messages(("user", "w1"))], tokenizer)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        first([messages(("user", "w1"), ("assistant", "w2"))], bare)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{% if add_generation_prompt %}w1 {% else %}w2 {% endif %}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="renders the prompt differently when an answer follows"):
        first([messages(("user", "w1"), ("assistant", "w2"))], rewriting)


# What the teacher reads


def test_text_prompts_show_the_teacher_columns_of_the_row(tokenizer):
    row = {"prompt": "w1", "completion": "w2", "answer": "{note}", "note": "w5", "n": 7}
    sample = first(
        [row], tokenizer, teacher_prompt_prefix="w9 {note} {answer} {{note}} ", prompt_template="w8 {prompt}"
    )
    # A value is not read again.
    assert sample == Sample([8, 1, 2, EOS], [0, 0, 1, 1], 0, 2, teacher_prompt_ids=[9, 5, 121, 121, 8, 1])
    prefix = "{{{n}}} {{note}} { {note}"
    options = EncodeOptions.from_config(config(teacher_prompt_prefix=prefix), "pair")
    assert _format_prefix(row, options) == "{7} {note} { w5"
    assert first([row], tokenizer, teacher_prompt_prefix="w{n} ").teacher_prompt_ids == [7, 1]
    assert first([row], tokenizer, teacher_prompt_prefix="").teacher_prompt_ids == [1]
    assert first([row], tokenizer).teacher_prompt_ids is None
    assert "teacher_prompt_ids" not in prepare(Dataset.from_list([row]), tokenizer, config()).column_names


def test_chats_have_a_system_turn_and_a_prefix_of_the_teachers_own(tokenizer):
    row = {"prompt": "w1", "completion": "w2", "answer": "w5"}
    options = dict(use_chat_template=True, teacher_prompt_prefix="{answer} ", teacher_system_prompt="w6")
    sample = first([row], tokenizer, system_prompt="w7", **options)
    assert sample.input_ids == [125, 7, 123, 1, 124, 2, EOS]
    assert sample.teacher_prompt_ids == [125, 6, 123, 5, 1, 124]
    del options["teacher_system_prompt"]
    assert first([row], tokenizer, system_prompt="w7", **options).teacher_prompt_ids == [125, 7, 123, 5, 1, 124]


def test_the_prefix_of_a_conversation_is_in_its_last_user_turn_and_earlier_answers_are_no_targets(tokenizer):
    row = messages(("system", "w7"), ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    sample = first([row], tokenizer, teacher_prompt_prefix="w9 ", teacher_system_prompt="w6")
    assert sample.input_ids == [125, 7, 123, 1, 124, 2, EOS, 123, 3, 124, 4, EOS]
    assert sample.supervised == [0] * 10 + [1, 1]
    assert sample.teacher_prompt_ids == [125, 6, 123, 1, 124, 2, EOS, 123, 9, 3, 124]


def test_the_prefix_of_a_text_prompt_begins_the_text():
    """A tokenizer that writes a first token of its own writes it once, before the prefix."""
    row, options = {"text": "w1 w2 w3 w4"}, dict(text_prompt_length=3, teacher_prompt_prefix="w9 w8 ")
    assert first([row], make_tokenizer(), **options).teacher_prompt_ids == [9, 8, 1, 2, 3]
    with_bos = make_tokenizer()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 121)])
    sample = first([row], with_bos, **options)
    assert sample == Sample([121, 1, 2, 3, 4, EOS], [0, 0, 0, 1, 1, 1], 0, 3, teacher_prompt_ids=[121, 9, 8, 1, 2])


@pytest.mark.parametrize("name", ["answr", "", "1"])
def test_a_prefix_that_names_no_column_is_refused(tokenizer, name):
    """It would teach from the braces themselves."""
    row = {"prompt": "w1", "completion": "w2", "answer": "w5"}
    message = (
        rf"names the column '{name}', and the data's columns are 'prompt', 'completion', 'answer'; .* \{{\{{{name}"
    )
    with pytest.raises(ValueError, match=message):
        first([row], tokenizer, teacher_prompt_prefix=f"w9 {{{name}}} ")


def test_only_the_students_sequence_is_cut(tokenizer):
    row = {"prompt": "w1 w2", "completion": "w3 w4 w5 w6"}
    limits = dict(max_length=4, max_prompt_length=3)
    sample = first([row], tokenizer, teacher_prompt_prefix="w9 w9 w9 w9 ", **limits)
    assert sample.input_ids == [1, 2, 3, 4]
    assert collate([sample], 0)["teacher_input_ids"].tolist() == [[9, 9, 9, 9, 1, 2, 3, 4]]


def test_a_system_turn_needs_a_chat(tokenizer):
    row = {"prompt": "w1", "completion": "w2"}
    with pytest.raises(ValueError, match=r"'w6' is a turn of a chat, .*_prefix, or set use_chat_template: true"):
        first([row], tokenizer, teacher_system_prompt="w6")
    with pytest.raises(ValueError, match=r"is a turn of a chat, and the prompts are text: use teacher_prompt_prefix$"):
        first([{"text": "w1 w2 w3"}], tokenizer, teacher_system_prompt="w6", text_prompt_length=1)


@pytest.mark.parametrize("packing", [True, False])
def test_plain_text_has_no_prompt_to_change(tokenizer, packing):
    with pytest.raises(ValueError, match=r"teacher_prompt_prefix: plain text has no prompt that the teacher's context"):
        first([{"text": "w1 w2"}], tokenizer, teacher_prompt_prefix="w9 ", packing=packing)


def test_a_prefix_needs_a_user_turn_and_values_that_are_text(tokenizer):
    row = {"messages": [{"role": "system", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    with pytest.raises(
        ValueError, match="teacher_prompt_prefix goes before the text of a user turn, and a prompt has no"
    ):
        first([row], tokenizer, teacher_prompt_prefix="w9 ")
    row = {"prompt": "w1", "completion": "w2", "answer": None}
    with pytest.raises(ValueError, match="column 'answer' holds None, which teacher_prompt_prefix cannot insert"):
        first([row], tokenizer, teacher_prompt_prefix="{answer} ")
