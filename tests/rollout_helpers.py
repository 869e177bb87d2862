"""Comparisons of engines with the models that they serve, and an engine that counts its rounds."""

import json
import math

import torch
from helpers import make_model, make_trainer, make_vllm_model
from peft import LoraConfig, get_peft_model

from rollouts import HFEngine, RolloutError
from sekd.on_policy.engines import send_weights

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12]]


def vllm_logps(engine, ids):
    """vLLM's log-probability of each token but the first."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompt = [{"prompt_token_ids": ids}]
    (output,) = engine.llm.generate(prompt, params, lora_request=engine.lora, use_tqdm=False)
    return torch.tensor(
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    )


SAID = [1, 2, 3]


@torch.no_grad()
def say(model, logits):
    """The model, changed so that after the prompt ``SAID`` its logits of some tokens are about these."""
    hidden = model.base_model(input_ids=torch.tensor([SAID])).last_hidden_state[0, -1]
    for token, logit in logits.items():
        model.lm_head.weight[token] = hidden * logit / hidden.dot(hidden)
    return model


def model_logps(model, ids):
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def make_lora(**options):
    """A tiny student with an adapter that changes it a lot."""
    settings = dict(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    adapted = get_peft_model(make_vllm_model(), LoraConfig(**settings | options))
    change_adapter(adapted)
    return adapted


@torch.no_grad()
def change_adapter(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def logps(engine, ids):
    if engine.uses_servers:
        (served,) = engine.logprobs(ids).values()
        return torch.tensor(served)
    return vllm_logps(engine, ids)


def largest_difference(engine, model, sequences):
    with torch.autocast("cpu", torch.bfloat16):
        return max((logps(engine, ids) - model_logps(model, ids)).abs().max().item() for ids in sequences)


def check_parity(engine, model):
    """Log-probabilities of over 500 tokens agree after a sync, and differ after a change until the next sync."""
    send_weights(engine, model, 0, engine.lora_rank)
    rollouts = engine.generate([[i, i + 1, i + 2] for i in range(40)])
    assert {r.weights_step for r in rollouts} == {0}
    sequences = [r.prompt_ids + r.completion_ids for r in rollouts]
    assert sum(map(len, sequences)) > 500
    assert largest_difference(engine, model, sequences) < 0.05
    change_adapter(model, 1)
    assert largest_difference(engine, model, sequences) > 0.2, "a skipped sync must show"
    send_weights(engine, model, 1, engine.lora_rank)
    assert largest_difference(engine, model, sequences) < 0.05
    assert engine.generate(PROMPTS)[0].weights_step == 1


def check_syncs(engine, model):
    """A hundred syncs change no bit of the student."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(100):
        send_weights(engine, model, step, engine.lora_rank)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


ON_POLICY = dict(lmbda=1.0, temperature=1.0, max_prompt_length=16, save_rollouts=True, report_to="none")


class Counting(HFEngine):
    """Generates with its own copy of the weights, like a server. It counts its rounds, and can fail."""

    def __init__(self, **options):
        super().__init__(make_model("untied"), max_completion_length=6, **options)
        self.rounds, self.fails_after = [], math.inf

    def generate(self, prompts):
        if len(self.rounds) >= self.fails_after:
            raise RolloutError("no server answers")
        self.rounds.append((self.step, len(prompts)))
        return super().generate(prompts)


def make_run(folder, tokenizer, pairs, engine=None, callbacks=(), **options):
    """A trainer that is configured for servers, with ``engine`` in their place."""
    engine = engine or Counting(top_logprobs=20 * (options.get("score_source") == "rollout"))
    trainer_options = dict(rollout_engine=engine, callbacks=[*callbacks])
    settings = ON_POLICY | dict(rollout_engine="vllm_server", max_steps=8) | options
    return make_trainer(folder, tokenizer, pairs, trainer_options=trainer_options, **settings)


def read_rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
