"""Return-conditioned RL: labels of steps, the data set, forced labels in the sampler, the script."""
import copy
import itertools
import json
import os
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import GPT2, TEXTS, coin_logprobs, real_data, run_script, tiny
from test_rewards import REFERENCE, Known, log_of, run, solution

from eval import judge
from model import Transformer
from rcrl import choose, labelled_example, step_labels, verdict, with_share
from sample import (Sample, Sampler, draw, learn_bpe, load_tokenizer, n_learned, random_stream,
                    token_logprobs, uniform)
from sft import cross_entropy, solution_examples

# ---- labels of steps ----
def test_a_verdict_is_what_every_continuation_agrees_on():
    for rollouts, threshold in itertools.product(range(1, 6), (0.01, 0.3, 0.5, 0.6, 1.0)):
        for n_right, n_wrong in itertools.product(range(rollouts + 1), repeat=2):
            n_open = rollouts - n_right - n_wrong
            ends = {(n_right + more) / rollouts >= threshold for more in range(n_open + 1)}
            found = verdict([True] * n_right + [False] * n_wrong, rollouts, threshold)
            assert n_open < 0 or ends == ({True, False} if found is None else {found})
    assert verdict([True] * 7, 25, 0.28) is True  # 0.28 * 25 is a little more than 7 in floats

@pytest.mark.parametrize('right', [False, True])
def test_labels_against_a_policy_of_known_success(bpe, right):
    for threshold, success in itertools.product((0.25, 0.5, 0.75, 1.0), range(5)):  # of four rollouts
        sampler, s = Known(bpe), solution(bpe, f' {success}\n#### {10 if right else 9}')
        row, = step_labels(sampler, [[s]], 8, threshold, 40, 1.0, 0)
        share = (right + sum(j % 4 < success for j in range(7))) / 8  # with the solution itself
        n = 0 if threshold == 1 and not right else 7  # none where the label is settled
        assert row == {'labels': [[share >= threshold if n else False, right]], 'rollouts': n}
        assert sampler.asked.total() == n
        assert sampler.budgets == [40 - (s.ends[0] + 1)] * n  # what is left

def test_what_is_settled_is_not_sampled_and_what_is_shared_is_sampled_once(bpe):
    sampler = Known(bpe)
    texts = '4\n0\n#### 10', *['4\n3\n#### 10'] * 2, '0\n0\n#### 9', *['0\n1\n#### 9'] * 2, '0\n#### 9'
    some = [solution(bpe, text) for text in texts] + [solution(bpe, '#### 10', finished=False)]
    rows = step_labels(sampler, [some[:3], some[3:], []], 4, 0.5, 40, 1.0, 0)
    # "4" has three right, where two of four suffice, "0" three wrong, "4 3" two right; the rest is open
    assert sampler.asked == {'4\n0\n': 3, '0\n0\n': 3, '0\n1\n': 2}
    good, bad = [[True, False, True], [True] * 3, [True] * 3], [[False] * n for n in (3, 3, 3, 2, 1)]
    assert [(row['labels'], row['rollouts']) for row in rows] == [(good, 3), (bad, 5), ([], 0)]

# ---- the data set ----
def test_the_mix_is_as_asked_and_as_large_as_can_be():
    rng = random.Random(0)
    for n_good, n_bad in ((0, 5), (5, 0), (30, 70), (70, 30), (1, 1), (200, 3)):
        good = rng.sample([True] * n_good + [False] * n_bad, n_good + n_bad)
        assert with_share(good, 0.0, rng) == list(range(len(good)))
        for share in (0.25, 0.5, 0.75, 0.9, 1.0):
            chosen = with_share(good, share, rng)
            n, n_chosen_good = len(chosen), sum(good[i] for i in chosen)
            assert chosen == sorted(set(chosen)) and abs(n_chosen_good - share * n) <= 1
            assert n_chosen_good == n_good or n - n_chosen_good == n_bad  # not one of each is left over
    drawn = {tuple(with_share([True] * 4 + [False] * 2, 0.5, random.Random(seed))) for seed in range(99)}
    assert drawn == {(*pair, 4, 5) for pair in itertools.combinations(range(4), 2)}  # at random

def test_solutions_and_steps_in_the_wanted_mix(bpe):
    labelled = [(solution(bpe, f' {i}\n#### 10'), [True, True]) for i in range(30)]
    labelled += [(solution(bpe, f' {i}\n#### 9'), [i % 2 == 0, False]) for i in range(30)]
    assert choose(labelled, 0, 0, random.Random(0)) == [(s, labels, {0, 1}) for s, labels in labelled]
    for right_share, good_share in ((0.5, 0.65), (0.75, 0.9), (1, 1)):
        chosen = choose(labelled, right_share, good_share, random.Random(0))
        taken = [labels[i] for _, labels, steps in chosen for i in steps]
        assert sum(s.correct for s, _, _ in chosen) / len(chosen) == pytest.approx(right_share, abs=0.02)
        assert sum(taken) / len(taken) == pytest.approx(good_share, abs=0.05)
    assert choose(labelled[-1:], 0, 1, random.Random(0)) == [(*labelled[-1], {1})]  # else nothing is left

def with_labels(granularity='step', new=True):
    tokenizer = learn_bpe(TEXTS, 120)  # bpe, once more
    tokenizer.add_labels(granularity, new)
    return tokenizer

def learned_ids(e):
    return [token for token, label in zip(e.ids[e.n_prompt:], e.labels) if label == label]

@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('granularity', ['step', 'solution'])
def test_labels_stand_before_lines_and_are_never_learned(bpe, granularity, new):
    tok = with_labels(granularity, new)
    V, G, B = tok.vocab_size, tok.labels.good, tok.labels.bad
    assert (G, B) == (([V], [V + 1]) if new else (bpe.encode('[GOOD]'), bpe.encode('[BAD]')))
    s = solution(bpe, ' a\n\nb\n#### 10')
    a, newline, b, answer = map(bpe.encode, (' a', '\n', 'b', '#### 10'))
    # the blank line belongs to the step after it
    by_step = G + a + newline + B + newline + B + b + newline + G + answer + [bpe.eos]
    e = labelled_example(s, [True, False, True], tok)
    assert e.ids == s.prompt_ids + (by_step if granularity == 'step' else G + s.ids)
    assert learned_ids(e) == s.ids and n_learned([e]) == len(s.ids)
    # steps that are not learned are read, with their labels
    part, plain = labelled_example(s, [True, False, True], tok, learned={2}), labelled_example(s, None, tok)
    assert part.ids == e.ids and learned_ids(part) == answer + [bpe.eos]
    assert plain.ids == s.prompt_ids + s.ids and learned_ids(plain) == s.ids

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('spare', [0, 1, 40])
def test_new_rows_of_the_vocabulary(bpe, tied, spare):
    V = bpe.vocab_size
    old = tiny(V + spare, tied=tied)
    new = copy.deepcopy(old).add_tokens(V, 2)
    assert new.config.vocab_size == len(new.embed.weight) == len(new.head.weight) >= V + 2
    assert new.config.vocab_size == V + spare if spare > 1 else new.config.vocab_size % 64 == 0
    assert (new.head.weight is new.embed.weight) == tied and all(p.requires_grad for p in new.parameters())
    for a, b in ((new.embed.weight, old.embed.weight), (new.head.weight, old.head.weight)):
        assert torch.equal(a[:V], b[:V])  # what was there stays
        torch.testing.assert_close(a[V:V + 2], b[:V].mean(0).expand(2, -1))

# ---- forced labels in the sampler ----
def line_breakers(bpe, granularity, new):
    """A tokenizer for which every fourth token ends a line, so that random weights write many lines."""
    tok = with_labels(granularity, new)
    tok.newline_ids = frozenset(range(0, bpe.vocab_size - 1, 4))
    return tok

def drawn_alone(model, tok, sample, label, budget, stream, temperature):
    """A sample's row alone, uncached -> the tokens that would be drawn there, the log-probs of its own."""
    ids, places, t = sample.prompt_ids + label, [], 0  # t: the place in the budget, labels included
    for token in sample.ids:
        places.append((len(ids) - 1, t))
        inserted = label if token in tok.newline_ids and tok.labels.granularity == 'step' else []
        ids, t = ids + [token] + inserted, t + 1 + len(inserted)
    assert sample.finished == (sample.ids[-1] == tok.eos)
    assert places[-1][1] < budget and (sample.finished or t >= budget)
    logits = model(torch.tensor([ids]))[0].detach()
    tokens = [draw(logits[at:at + 1], uniform(stream, t), temperature, vocab_size=tok.vocab_size)[0].item()
              for at, t in places]
    read = logits[[at for at, _ in places]]
    return tokens, token_logprobs(read, torch.tensor(sample.ids), temperature or 1.0)

@pytest.mark.parametrize('changes, granularity, new', [
    ({}, 'step', True), (GPT2, 'step', False), ({}, 'solution', False), (GPT2, 'solution', True)])
def test_forced_labels_equal_the_unbatched_reference(bpe, changes, granularity, new):
    prompts = ['Question: Tom', 'A', 'Question: Ann sells 4 pens for 5 dollars each.', 'Question: Tom has']
    tok, n_inserted = line_breakers(bpe, granularity, new), 0
    model = tiny(bpe.vocab_size, **changes).add_tokens(bpe.vocab_size, 2)
    for (condition, label), (temperature, max_rows) in itertools.product(
            (('good', tok.labels.good), ('bad', tok.labels.bad), ('none', [])), ((1.0, 7), (0, 64))):
        sampler = Sampler(model, tok, max_rows, condition=condition)
        for i, s in enumerate(sampler.generate(prompts, 3, 30, temperature, seed=5)):
            assert s.prompt_ids == tok.encode(prompts[i // 3])
            stream = torch.tensor([random_stream(5, s.prompt_ids, i % 3)])
            tokens, logprobs = drawn_alone(model, tok, s, label, 30, stream, temperature)
            assert s.ids == tokens
            torch.testing.assert_close(torch.tensor(s.logprobs), logprobs, atol=1e-5, rtol=1e-5)
            n_inserted += len(label) * sum(token in tok.newline_ids for token in s.ids[:-1])
    assert n_inserted > 20

def test_what_is_learned_is_what_is_sampled(bpe):
    """The loss of the training row that is made of a sample is that of the log-probs it was drawn with."""
    tok = line_breakers(bpe, 'step', False)
    model = tiny(bpe.vocab_size, block_size=256)
    samples = Sampler(model, tok, condition='bad').generate(['Question: Tom', 'A'], 6, 40, 1.0)
    finished = [judge(REFERENCE, s, tok) for s in samples if s.finished]  # the others' last label may be cut
    assert finished
    for s in finished:
        loss = cross_entropy(model, [labelled_example(s, [False] * len(s.ends), tok)]).item()
        assert loss == pytest.approx(-sum(s.logprobs), abs=1e-4)

def test_labels_do_not_stand_between_the_parts_of_a_stop_string(bpe):
    tok, model = with_labels('step', False), tiny(bpe.vocab_size)
    newline, = bpe.encode('\n')
    model.logits = lambda hidden: F.one_hot(torch.full((len(hidden),), newline), bpe.vocab_size).float() * 50
    n_breaks = -(-31 // (1 + len(tok.labels.good)))  # in a budget of 31, with a label after each
    for stop, finished, n in (('\n\n', True, 2), ('GOOD', False, n_breaks)):  # the label is no text of its
        sample, = Sampler(model, tok).generate(['A'], 1, 31, 0, stop=stop)
        assert (sample.finished, len(sample.ids)) == (finished, n)

def test_a_budget_for_each_prompt(model, bpe):
    prompts = ['Question: Tom', 'A', 'Question: Ann sells 4 pens for 5 dollars each. How much'] * 3
    budgets = [5, 30, 1, 12, 7, 30, 2, 2, 9]
    samples = Sampler(model, bpe, 4).generate(prompts, 2, budgets, 1.5, seed=1)
    whole = Sampler(model, bpe).generate(prompts, 2, 30, 1.5, seed=1)
    for s, w, n in zip(samples, whole, [n for n in budgets for _ in range(2)], strict=True):
        assert s.ids == w.ids[:n] and s.finished == (w.finished and len(w.ids) <= n)
    # what is done stays in the batch for a while: within the context, though its prompt nearly fills it
    long = [bpe.encode('Question: Tom ' * 20)[:90]] + [bpe.encode('Question: Ann')] * 20
    assert max(len(s.ids) for s in Sampler(model, bpe).generate(long, 1, [4] + [80] * 20, 1.5)) > 40

# ---- on disk ----
@pytest.mark.parametrize('folder, new', [
    ('', False), ('', True), ('weights/stories260K', True), ('tokenizers/gpt2', True),
    ('tokenizers/mistral', True)])
def test_labels_survive_saving_and_transformers_reads_the_export(folder, new, tmp_path):
    tok = load_tokenizer(real_data(*folder.split('/'))) if folder else learn_bpe(TEXTS, 120)
    V, text = tok.vocab_size, 'Answer: 3+4=<<3+4=7>>7\n#### 7'
    whole, ids = tok.encode_prompt(text), tok.encode(text)
    tok.add_labels('step', new)
    model = tiny(V).add_tokens(V, 2)
    model.save_pretrained(str(tmp_path), tok)
    again, theirs = load_tokenizer(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    good, bad = [[V], [V + 1]] if new else [tok.encode('[GOOD]'), tok.encode('[BAD]')]
    assert again.labels == tok.labels == (good, bad, 'step', new) and again.vocab_size == V
    assert again.encode(text) == ids and theirs(text)['input_ids'] == whole and len(theirs) == V + 2 * new
    if new:
        assert theirs.convert_tokens_to_ids(['[GOOD]', '[BAD]']) == [V, V + 1]
        assert again.decode(good + ids + bad) == tok.decode(ids)
    ours, ids = Transformer.from_pretrained(str(tmp_path)), torch.tensor([ids[:5] + good + ids[5:]])
    logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    torch.testing.assert_close(logits, ours(ids), atol=1e-4, rtol=1e-4)

# ---- the script ----
RUN = ('rcrl.py --init_from={coin}/policy --base={coin}/policy --k=4 --rollouts=3 --n_questions=24 '
       '--batch_size=16 --max_steps=120 --lr=5e-3 --min_lr=5e-4 --eval_problems=16 --right_share=0.5 '
       '--include_sft=False --unlabelled=0.2 --eval_interval=60 ')

@pytest.fixture(scope='module')
def learned(coin, tmp_path_factory):
    """A run whose labels are text and so differ from the first update on; new tokens start equal."""
    out = tmp_path_factory.mktemp('rcrl') / 'run'
    run(coin, RUN + '--label_tokens=text', out)
    return out

def log_odds(folder, good):
    """ln P(right) - ln P(wrong) of the coin after labels that say good, bad or (None) nothing."""
    def example(problem, tokenizer):
        e, = solution_examples([problem], tokenizer)
        s = judge(problem, Sample(e.ids[:e.n_prompt], e.ids[e.n_prompt:], [], True), tokenizer)
        return labelled_example(s, None if good is None else [good] * len(s.ends), tokenizer)
    right, wrong = coin_logprobs(folder, example)
    return right - wrong

def test_the_coin_falls_as_the_label_says(learned, coin):
    row = log_of(learned)[0]
    assert row['dataset_right'] == pytest.approx(0.5, abs=0.02) and row['dataset'] <= row['solutions']
    assert log_odds(learned / 'last', True) > log_odds(learned / 'last', False) + 5  # 18 to 21 over seeds
    shares = []
    for condition, suffix in (('good', ''), ('bad', '_bad'), ('none', '_none')):
        run(coin, f'eval.py --init_from={learned} --k=8 --condition={condition}', learned)
        found = json.loads((learned / f'eval_task{suffix}.json').read_text())
        records = (learned / f'eval_task{suffix}.jsonl').read_text()
        shares.append(found['metrics']['pass@1'][0])
        assert records.count('\n') == 16 and 'GOOD' not in records and 'BAD' not in records
    assert shares[0] > shares[1] + 0.3  # 128 samples each: a standard error of .06 at most
    table = run_script('eval.py', '--compare', str(learned)).stdout
    assert all(f'| {learned} {title} ' in table for title in ('[GOOD]', '[BAD]', '[NONE]'))
    said = run_script('sample.py', f'--init_from={learned}', '--start=What is number 3?', '--temperature=0',
                      '--max_new_tokens=40', '--condition=bad').stdout
    assert '#### ' in said and '[BAD]' not in said

@pytest.mark.slow
@pytest.mark.parametrize('flags', ['', '--granularity=solution', '--good_share=0.5 --right_share=0'])
def test_other_labels_mean_something_too(coin, tmp_path, flags):
    run(coin, RUN + flags + ' --max_steps=300 --eval_interval=300', tmp_path)
    assert log_odds(tmp_path / 'last', True) > log_odds(tmp_path / 'last', False) + 5  # 16 to 30 over seeds

def test_the_mix_of_what_is_learned(coin, tmp_path):
    run(coin, RUN + '--max_steps=1 --good_share=0.65', tmp_path)
    row = log_of(tmp_path)[0]
    assert row['dataset_right'] == pytest.approx(0.5, abs=0.02) and row['rollouts_drawn'] > 0
    assert row['steps_good'] < 0.55 < row['learned_good'] < 0.7 and row['learned_steps'] < row['steps']

@pytest.mark.parametrize('torn', ['samples.jsonl', 'labels.jsonl'])
def test_stopped_while_it_samples_or_labels_it_ends_the_same(learned, coin, tmp_path, torn):
    for file in {'config.json', 'samples.jsonl', torn}:
        shutil.copy(learned / file, tmp_path)
    os.truncate(tmp_path / torn, int(0.6 * os.path.getsize(tmp_path / torn)))
    run(coin, RUN + '--label_tokens=text --init_from=resume', tmp_path)
    for file in ('samples.jsonl', 'labels.jsonl', 'best/model.safetensors', 'last/model.safetensors'):
        assert (tmp_path / file).read_bytes() == (learned / file).read_bytes(), file
    assert log_of(tmp_path)[-1] == log_of(learned)[-1]

@pytest.mark.parametrize('command, match', [
    ('eval.py --init_from={coin}/policy --condition=bad', 'is no return-conditioned policy'),
    ('eval.py --init_from={learned} --few_shot=2', 'takes no few_shot'),
    (RUN + '--n_questions=1 --k=1', 'nothing to learn from: of 1 solutions'),
    # who does not know what to tell it does not take a return-conditioned policy
    *((command, 'is a return-conditioned policy') for command in (
        'sft.py --init_from={learned}', 'ppo.py --init_from={learned}', RUN + '--init_from={learned}',
        'rewards.py --kind=orm --init_from={coin}/policy --base={learned}', RUN + '--base={learned}',
        'ei.py --init_from={coin}/policy --base={learned}',
        *(f'ppo.py --init_from={{coin}}/policy --{flag}={{learned}}' for flag in ('ref', 'critic_from'))))])
def test_bad_input(coin, learned, tmp_path, command, match):
    run(coin, command, tmp_path / 'run', match, learned=learned)
    assert not (tmp_path / 'run' / 'last').exists()
