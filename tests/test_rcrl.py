"""Return-conditioned RL: the labels of steps, the mix of the data set, forced labels in the sampler, and the script as a whole."""
import copy
import itertools
import json
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import GPT2, Killed, coin_logprobs, dies_after, loud, real_data, run_script, tiny_config

import rewards
from config import UserError
from model import Checkpoints, Transformer
from rcrl import labelled_example, step_labels, verdict, with_share
from rewards import Problem, Response, step_ends, step_lines
from sample import Sample, Sampler, bpe_tokenizer, draw, load_tokenizer, random_stream, token_logprobs, uniform
from sft import loss_sum, n_learned

# -----------------------------------------------------------------------------
# the labels of steps


def test_a_verdict_is_what_every_continuation_agrees_on():
    for rollouts in range(1, 6):
        for threshold in (0.01, 0.3, 0.5, 0.6, 1.0):
            for n in range(rollouts + 1):
                for outcomes in itertools.product([False, True], repeat=n):
                    ends = {sum(outcomes + rest) / rollouts >= threshold for rest in itertools.product([False, True], repeat=rollouts - n)}
                    assert verdict(list(outcomes), rollouts, threshold) is (None if len(ends) == 2 else ends.pop())
    assert verdict([True] * 11, 20, 0.55) is True  # 0.55 * 20 is a little more than 11 in floats


def solution(bpe, text, finished=True):
    problem = Problem('What?', 'so\n#### 10', '10')
    ids = bpe.encode(text) + [bpe.eos]
    return Response(problem, '', ids, step_lines(ids, bpe), finished, finished and rewards.is_correct(text, '10'))


class Known:
    """A policy whose success from a prefix is known: so many of each four rollouts are right as its last line says."""
    label = []

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, Counter()
        self.model = SimpleNamespace(config=SimpleNamespace(block_size=1000))

    def generate(self, prompts, k, max_new_tokens, temperature, seed, first=None):
        samples = []
        for p in prompts:
            line = self.tokenizer.decode(p).strip().split('\n')[-1].split()[-1]
            right = self.asked[line] % 4 < int(line)
            self.asked[line] += 1
            samples.append(Sample(p, self.tokenizer.encode('#### 10' if right else '#### 9') + [self.tokenizer.eos], [], True))
        return samples


def test_labels_against_a_policy_of_known_success(bpe):
    for rollouts, threshold, good in ((8, 0.5, '234'), (8, 0.75, '34'), (8, 0.25, '1234'), (8, 1.0, '4')):
        for success in '01234':
            for answer, counted in (('#### 9', 0), ('#### 10', 1)):  # the solution itself is one of the rollouts
                sampler = Known(bpe)
                labels, drawn = step_labels(sampler, [solution(bpe, f' {success}\n{answer}')], rollouts, threshold, 40, 1.0, 0)
                share = (counted + sum(j % 4 < int(success) for j in range(rollouts - 1))) / rollouts
                settled = threshold == 1.0 and not counted
                assert labels == [[share >= threshold and not settled, bool(counted)]]
                assert sampler.asked[success] == sum(drawn.values()) == (0 if settled else rollouts - 1)
                if not settled and abs(int(success) / 4 - threshold) >= 0.25:  # what is not on the edge: success decides
                    assert labels[0][0] == (success in good)


def test_what_is_settled_is_not_sampled_and_what_is_shared_is_sampled_once(bpe):
    sampler = Known(bpe)
    rs = [solution(bpe, ' 4\n0\n#### 10'), solution(bpe, ' 4\n3\n#### 10'), solution(bpe, ' 4\n3\n#### 10'), solution(bpe, ' 0\n0\n#### 9'),
          solution(bpe, ' 0\n1\n#### 9'), solution(bpe, ' 0\n#### 9'), solution(bpe, ' #### 10', finished=False)]
    labels, drawn = step_labels(sampler, rs, 4, 0.5, 40, 1.0, 0)
    # "4": two of its three are right, that is half of four; "0": all of three wrong; "4 3": two right; those that are open: 4 - 1 each
    assert sampler.asked == {'0': 3 + 3, '1': 3} and drawn == {rs[0].problem: 9}
    assert labels == [[True, False, True], [True, True, True], [True, True, True], [False, False, False], [False, False, False],
                      [False, False], [False]]


def test_labels_by_a_real_policy(coin):
    """After '1+1=2' the coin's policy always answers 2, after '1+2=3' always 3."""
    tokenizer = load_tokenizer(str(coin / 'policy'))
    sampler = Sampler(Transformer.from_pretrained(str(coin / 'policy')), tokenizer, max_rows=32)
    rs = []
    for i in range(4):
        problem = rewards.load_problems(str(coin / 'task'), 'train')[i]
        for s in sampler.generate([rewards.prompt(problem.question)], 4, 40, 1.0, seed=i):
            rs.append(rewards.respond(problem, s, tokenizer))
    labels, _ = step_labels(sampler, rs, 6, 0.5, 40, 1.0, 0)
    assert {r.correct for r in rs} == {True, False}
    assert labels == [[r.correct, r.correct] if len(r.lines) == 2 else [r.correct] for r in rs]


def test_rollouts_have_what_is_left_of_the_budget(bpe):
    sampler, budgets = Known(bpe), []
    generate = sampler.generate
    sampler.generate = lambda prompts, k, max_new_tokens, *a, **b: budgets.extend(max_new_tokens) or generate(prompts, k, max_new_tokens, *a, **b)
    r = solution(bpe, ' 4\n4\n#### 9')
    _, drawn = step_labels(sampler, [r], 2, 0.5, 20, 1.0, 0)
    assert budgets == [20 - (end + 1) for end in step_ends(r)[:-1]]


# -----------------------------------------------------------------------------
# the data set

def test_the_mix_is_as_asked_and_as_large_as_can_be():
    rng = random.Random(0)
    for n_good, n_bad in ((0, 5), (5, 0), (30, 70), (70, 30), (1, 1), (200, 3)):
        good = [True] * n_good + [False] * n_bad
        rng.shuffle(good)
        assert with_share(good, 0.0, rng) == list(range(n_good + n_bad))
        for share in (0.25, 0.5, 0.75, 0.9, 1.0):
            chosen = with_share(good, share, rng)
            n = len(chosen)
            assert chosen == sorted(set(chosen))
            assert abs(sum(good[i] for i in chosen) - share * n) <= 1
            # nothing is left over on both sides: another good and another bad one would not both fit
            assert sum(good[i] for i in chosen) == n_good or n - sum(good[i] for i in chosen) == n_bad
    everything = Counter(i for seed in range(300) for i in with_share([True] * 4 + [False] * 2, 0.5, random.Random(seed)))
    assert len(everything) == 6 and everything[4] == 300 and 100 < min(everything[i] for i in range(4))  # drawn at random


def with_labels(bpe, granularity='step', new=True):
    tokenizer = bpe_tokenizer(sorted(bpe.encoding._mergeable_ranks, key=bpe.encoding._mergeable_ranks.get))
    tokenizer.add_labels(granularity, new)
    return tokenizer


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('granularity', ['step', 'solution'])
def test_labels_stand_before_lines_and_are_never_learned(bpe, granularity, new):
    tok = with_labels(bpe, granularity, new)
    G, B = tok.labels.good, tok.labels.bad
    assert (G, B) == (([tok.vocab_size], [tok.vocab_size + 1]) if new else (bpe.encode('[GOOD]'), bpe.encode('[BAD]')))
    prompt, ids = bpe.encode('Why?'), bpe.encode(' a\n\nb\n#### 10') + [bpe.eos]
    ends = [end for end, _ in step_lines(ids, tok)]
    newline, = bpe.encode('\n')
    a, b, answer = (bpe.encode(text) for text in (' a', 'b', '#### 10'))
    assert ids == a + [newline] * 2 + b + [newline] + answer + [bpe.eos]
    e = labelled_example(prompt, ids, ends, [True, False, True], tok)
    if granularity == 'step':  # the blank line belongs to the step after it
        assert e.ids == prompt + G + a + [newline] + B + [newline] + B + b + [newline] + G + answer + [bpe.eos]
    else:
        assert e.ids == prompt + G + ids
    read = set(e.unlearned)
    assert [x for i, x in enumerate(e.ids) if i >= e.n_prompt and i not in read] == ids and n_learned([e]) == len(ids)

    # the loss is that of the solution's own tokens, each given all before it, labels included
    torch.manual_seed(0)
    model = loud(Transformer(tiny_config(bpe.vocab_size))).add_tokens(bpe.vocab_size, 2)
    with torch.no_grad():
        each = F.cross_entropy(model(torch.tensor([e.ids]))[0, :-1], torch.tensor(e.ids[1:]), reduction='none')
        expected = sum(each[i - 1] for i in range(e.n_prompt, len(e.ids)) if i not in read)
        torch.testing.assert_close(loss_sum(model, [e]), expected, rtol=1e-5, atol=1e-4)

    # steps that are not learned are read, with their labels
    part = labelled_example(prompt, ids, ends, [True, False, True], tok, learned={2})
    assert part.ids == e.ids
    assert [x for i, x in enumerate(e.ids) if i >= e.n_prompt and i not in set(part.unlearned)] == answer + [bpe.eos]
    plain = labelled_example(prompt, ids, ends, None, tok)
    assert plain.ids == prompt + ids and not plain.unlearned


def test_new_rows_of_the_vocabulary(bpe):
    for tied in (True, False):
        for size in (bpe.vocab_size, bpe.vocab_size + 1, bpe.vocab_size + 40):  # none to spare, one, enough
            old = loud(Transformer(tiny_config(size, tied=tied)))
            new = copy.deepcopy(old).add_tokens(bpe.vocab_size, 2)
            assert new.config.vocab_size == len(new.embed.weight) == len(new.head.weight) >= bpe.vocab_size + 2
            assert new.config.vocab_size == size if size > bpe.vocab_size + 1 else new.config.vocab_size % 64 == 0
            assert (new.head.weight is new.embed.weight) == tied and all(p.requires_grad for p in new.parameters())
            ids = torch.tensor([bpe.encode('Tom has 3 apples')])
            V = bpe.vocab_size
            torch.testing.assert_close(new(ids)[..., :V], old(ids)[..., :V])  # what was there stays
            torch.testing.assert_close(new.embed.weight[V:V + 2], old.embed.weight[:V].mean(0).expand(2, -1))
            torch.testing.assert_close(new.head.weight[V:V + 2], old.head.weight[:V].mean(0).expand(2, -1))


# -----------------------------------------------------------------------------
# forced labels in the sampler

def line_breakers(bpe, granularity, new):
    """A tokenizer for which every fourth token ends a line, so that random weights write many lines."""
    tok = with_labels(bpe, granularity, new)
    tok.newline_ids = frozenset(range(0, bpe.vocab_size - 1, 4))
    return tok


def drawn_alone(model, tok, sample, label, budget, stream, temperature):
    """A sample's row alone and uncached, with the label after the prompt and after every line break: what would be drawn at each
    of its places -> (tokens, log-probs of the sample's)."""
    ids, places, t = sample.prompt_ids + label, [], 0  # t: the place within the budget, of which labels take a part
    for token in sample.ids:
        places.append((len(ids) - 1, t))
        inserted = label if token in tok.newline_ids and tok.labels.granularity == 'step' else []
        ids, t = ids + [token] + inserted, t + 1 + len(inserted)
    assert places[-1][1] < budget and (sample.finished or t >= budget) and sample.finished == (sample.ids[-1] == tok.eos)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    tokens = [draw(logits[at:at + 1], uniform(stream, t), temperature, vocab_size=tok.vocab_size)[0].item() for at, t in places]
    return tokens, token_logprobs(logits[[at for at, _ in places]], torch.tensor(sample.ids), temperature or 1.0)


def test_forced_labels_equal_the_unbatched_reference(bpe):
    prompts = ['Question: Tom', 'A', 'Question: Ann sells 4 pens for 5 dollars each. How much', 'Question: Tom has']
    for changes, granularity, new in (({}, 'step', True), (GPT2, 'step', False), ({}, 'solution', False), (GPT2, 'solution', True)):
        tok = line_breakers(bpe, granularity, new)
        model = loud(Transformer(tiny_config(bpe.vocab_size, **changes))).add_tokens(bpe.vocab_size, 2)
        n_inserted = 0
        for condition, label in (('good', tok.labels.good), ('bad', tok.labels.bad), ('none', [])):
            for temperature, max_rows in ((1.0, 7), (0, 64)):
                samples = Sampler(model, tok, max_rows, condition=condition).generate(prompts, 3, 30, temperature, seed=5)
                for i, s in enumerate(samples):
                    prompt = tok.encode(prompts[i // 3])
                    tokens, logprobs = drawn_alone(model, tok, s, label, 30, torch.tensor([random_stream(5, prompt, i % 3)]), temperature)
                    assert s.prompt_ids == prompt and s.ids == tokens
                    torch.testing.assert_close(torch.tensor(s.logprobs), logprobs, atol=1e-5, rtol=1e-5)
                    n_inserted += len(label) * sum(token in tok.newline_ids for token in s.ids[:-1])
        assert n_inserted > 100


def test_what_is_learned_is_what_is_sampled(bpe):
    """The sampler's log-probs are those of the training row that labelled_example makes of its sample."""
    tok = line_breakers(bpe, 'step', False)
    model = loud(Transformer(tiny_config(bpe.vocab_size, block_size=256)))
    for s in Sampler(model, tok, condition='bad').generate(['Question: Tom', 'A'], 6, 40, 1.0):
        if not s.finished:  # the label after its last line break may have been cut
            continue
        e = labelled_example(s.prompt_ids, s.ids, [len(s.ids) - 1], [False], tok)
        at = torch.tensor([i for i in range(e.n_prompt, len(e.ids)) if i not in set(e.unlearned)])
        with torch.no_grad():
            logits = model(torch.tensor([e.ids]))[0]
        torch.testing.assert_close(torch.tensor(s.logprobs), token_logprobs(logits[at - 1], torch.tensor(s.ids)), atol=1e-5, rtol=1e-5)


def test_a_label_is_never_drawn(bpe):
    tok = with_labels(bpe)
    model = loud(Transformer(tiny_config(bpe.vocab_size))).add_tokens(bpe.vocab_size, 2)
    with torch.no_grad():
        model.embed.weight[bpe.vocab_size:] *= 100  # tied: often the likeliest by far
    for temperature in (0, 1.0):
        assert all(max(s.ids) < bpe.vocab_size for s in Sampler(model, tok).generate(['A', 'Tom'], 50, 20, temperature))


def test_bad_conditions(model, bpe):
    for tok, condition in ((with_labels(bpe), 'great'), (with_labels(bpe), 'granularity'), (bpe, 'bad')):
        with pytest.raises(UserError, match="condition is 'good', 'bad' or 'none'"):
            Sampler(model, tok, condition=condition)
    with pytest.raises(UserError, match='max_rows'):
        Sampler(model, bpe, max_rows=0)


def test_labels_do_not_stand_between_the_parts_of_a_stop_string(bpe):
    tok = with_labels(bpe, 'step', False)
    newline, = bpe.encode('\n')
    model = loud(Transformer(tiny_config(bpe.vocab_size)))
    model.logits = lambda hidden: F.one_hot(torch.full((len(hidden),), newline), bpe.vocab_size).float() * 50
    alone = -(-31 // (1 + len(tok.labels.good)))  # line breaks in a budget of 31, with a label after each
    for stop, finished, n in (('\n\n', True, 2), ('GOOD', False, alone)):  # the label is no text of the sample's
        sample, = Sampler(model, tok).generate(['A'], 1, 31, 0, stop=stop)
        assert (sample.finished, len(sample.ids)) == (finished, n)


def test_a_budget_for_each_prompt(model, bpe):
    prompts = ['Question: Tom', 'A', 'Question: Ann sells 4 pens for 5 dollars each. How much'] * 3
    budgets = [5, 30, 1, 12, 7, 30, 2, 2, 9]
    samples = Sampler(model, bpe, 4).generate(prompts, 2, budgets, 1.5, seed=1)
    whole = Sampler(model, bpe).generate(prompts, 2, 30, 1.5, seed=1)
    for budget, s, w in zip([b for b in budgets for _ in range(2)], samples, whole):
        assert s.ids == w.ids[:budget] and s.finished == (w.finished and len(w.ids) <= budget)
    # what is done waits for others to leave with it: within the context, though its prompt ends just before its end
    long = [bpe.encode('Question: Tom ' * 20)[:90]] + [bpe.encode('Question: Ann')] * 20
    samples = Sampler(model, bpe).generate(long, 1, [4] + [80] * 20, 1.5)
    assert len(samples[0].ids) <= 4 and max(len(s.ids) for s in samples) > 40
    with pytest.raises(UserError, match='2 budgets for 9 prompts'):
        Sampler(model, bpe).generate(prompts, 1, [3, 4], 1.0)
    with pytest.raises(UserError, match='max_new_tokens = 90 exceed the context of 96'):
        Sampler(model, bpe).generate(prompts, 1, budgets[:-1] + [90], 1.0)


# -----------------------------------------------------------------------------
# on disk

@pytest.mark.parametrize('new', [True, False])
def test_labels_survive_saving_and_transformers_reads_the_export(bpe, new, tmp_path):
    tok = with_labels(bpe, 'step', new)
    model = loud(Transformer(tiny_config(bpe.vocab_size))).add_tokens(bpe.vocab_size, 2)
    model.save_pretrained(str(tmp_path / 'm'), tok)
    again = load_tokenizer(str(tmp_path / 'm'))
    assert again.labels == tok.labels and again.vocab_size == bpe.vocab_size and again.encode('Tom has 3') == bpe.encode('Tom has 3')
    with pytest.raises(UserError, match='return-conditioned'):
        load_tokenizer(str(tmp_path / 'm'), conditioned=False)
    theirs, auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm').eval(), transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')
    assert auto('Tom has 3')['input_ids'] == bpe.encode('Tom has 3') and len(auto) == bpe.vocab_size + 2 * new
    ids = torch.tensor([bpe.encode('Answer:') + tok.labels.good + bpe.encode(' Tom')])
    if new:
        assert auto('Answer:[GOOD] Tom')['input_ids'] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, Transformer.from_pretrained(str(tmp_path / 'm'))(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', ['stories260K', 'gpt2', 'mistral'])
def test_labels_of_hugging_face_tokenizers(name, tmp_path):
    folder = real_data('weights', name) if name == 'stories260K' else real_data('tokenizers', name)
    tok = load_tokenizer(folder)
    before, text = tok.vocab_size, 'Answer: 3+4=<<3+4=7>>7\n#### 7'
    ids = tok.encode(text)
    tok.add_labels('solution', True)
    tok.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert again.labels == tok.labels and again.labels.good == [before] and again.vocab_size == before
    assert again.encode(text) == ids and again.decode(again.labels.good + ids + again.labels.bad) == tok.decode(ids)
    assert again.hf.convert_tokens_to_ids(['[GOOD]', '[BAD]']) == [before, before + 1]


# -----------------------------------------------------------------------------
# the script

RUN = ['--k=4', '--rollouts=3', '--n_questions=24', '--max_new_tokens=40', '--batch_size=16', '--max_steps=120', '--lr=5e-3', '--min_lr=5e-4', '--eval_problems=16',
       '--right_share=0.5', '--include_sft=False', '--unlabelled=0.2', '--eval_interval=60', '--device=cpu']


def log_of(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in ('time', 'tokens_per_second')} for line in open(folder / 'log.jsonl')]


def start_run(coin, out, *flags):
    """-> the first line of the log, which is about the data set."""
    run_script('rcrl.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--base={coin}/policy', f'--out_dir={out}', *RUN, *flags)
    return log_of(out)[0]


@pytest.fixture(scope='module')
def learned(coin, tmp_path_factory):
    """rcrl.py on the coin's task, whose right and wrong solutions differ in their first step. Labels that are text differ from the
    first update on; new tokens, which start equal, take a varying number of updates until they do."""
    out = tmp_path_factory.mktemp('rcrl') / 'run'
    start_run(coin, out, '--label_tokens=text')
    return out


def log_odds(folder, good):
    """ln P(right) - ln P(wrong) of the coin after the labels that say good, bad or (None) nothing, by enumeration of its two sides."""
    def example(problem, tokenizer):
        prompt, ids = tokenizer.encode_pair(rewards.prompt(problem.question), rewards.completion(problem.solution))
        ends = [end for end, _ in step_lines(ids + [tokenizer.eos], tokenizer)]
        return labelled_example(prompt, ids + [tokenizer.eos], ends, good if good is None else [good] * len(ends), tokenizer)
    right, wrong = coin_logprobs(folder, example)
    return right - wrong


def test_the_coin_falls_as_the_label_says(learned, script, coin):
    rows = log_of(learned)
    assert rows[0]['dataset_right'] == pytest.approx(0.5, abs=0.02) and rows[0]['dataset'] <= rows[0]['solutions']
    assert log_odds(learned / 'last', True) > log_odds(learned / 'last', False) + 5  # 18 to 21 over seeds
    shares = {}
    for condition, name in (('good', 'eval_task'), ('bad', 'eval_task_bad'), ('none', 'eval_task_none')):
        script('eval.py', f'--init_from={learned}', f'--task={coin}/task', '--k=8', '--max_new_tokens=40', f'--condition={condition}', '--device=cpu')
        metrics = json.load(open(learned / f'{name}.json'))['metrics']
        shares[condition] = metrics['pass@1'][0]
        records = open(learned / f'{name}.jsonl').readlines()[1:]
        assert records
        for line in records:
            assert all('GOOD' not in s['text'] and 'BAD' not in s['text'] for s in json.loads(line)['samples'])
    assert shares['good'] > shares['bad'] + 0.3  # of 128 samples each: a standard error of the difference is 0.06 at most
    table = script('eval.py', '--compare', str(learned)).stdout
    for title in (f'| {learned} [GOOD] |', f'| {learned} [BAD] |', f'| {learned} (no label) |'):
        assert title in table
    said = script('sample.py', f'--init_from={learned}', '--start=What is number 3?', '--temperature=0', '--max_new_tokens=40', '--condition=bad').stdout
    assert '#### ' in said and '[BAD]' not in said


VARIANTS = {'new': [], 'solution': ['--granularity=solution'], 'half': ['--good_share=0.5', '--right_share=0']}


@pytest.mark.slow
def test_other_labels_mean_something_too(coin, tmp_path):
    for name, flags in VARIANTS.items():
        start_run(coin, tmp_path / name, *flags, '--max_steps=300', '--eval_interval=300')
        assert log_odds(tmp_path / name / 'last', True) > log_odds(tmp_path / name / 'last', False) + 5, name  # 16 to 30 over seeds


def test_the_mix_of_what_is_learned(coin, tmp_path):
    rows = {name: start_run(coin, tmp_path / name, *VARIANTS[name], '--max_steps=1') for name in ('solution', 'half')}
    assert [name for name, row in rows.items() if row['rollouts_drawn'] == 0] == ['solution']
    assert rows['half']['learned_good'] == pytest.approx(0.5, abs=0.1)
    # both at once, and more good steps than the chosen solutions have: of a wrong one, whose steps are all bad, the last stays
    row = start_run(coin, tmp_path / 'both', '--good_share=0.65', '--max_steps=1')
    assert row['dataset_right'] == pytest.approx(0.5, abs=0.02)
    assert row['steps_good'] < 0.55 < row['learned_good'] < 0.7 and row['learned_steps'] < row['steps']


def test_stopped_anywhere_it_ends_the_same(learned, script, coin, tmp_path):
    def cut(path, share):
        text = path.read_text()
        path.write_text(text[:int(len(text) * share)])

    flags = [f'--task={coin}/task', f'--base={coin}/policy', *RUN, '--label_tokens=text', '--init_from=resume']
    for name in ('sampling', 'labelling'):
        (tmp_path / name).mkdir()
        for file in ('config.json', 'samples.jsonl') + (('labels.jsonl',) if name == 'labelling' else ()):
            shutil.copy(learned / file, tmp_path / name)
        cut(tmp_path / name / ('labels.jsonl' if name == 'labelling' else 'samples.jsonl'), 0.6)
        script('rcrl.py', *flags, f'--out_dir={tmp_path}/{name}')
        for file in ('samples.jsonl', 'labels.jsonl', 'best/model.safetensors', 'last/model.safetensors'):
            assert (tmp_path / name / file).read_bytes() == (learned / file).read_bytes(), (name, file)


def test_stopped_while_it_learns_it_ends_the_same(learned, script, coin, tmp_path, monkeypatch):
    flags = [f'--task={coin}/task', f'--base={coin}/policy', f'--out_dir={tmp_path}/run', *RUN, '--label_tokens=text']
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, 'save', dies_after(1, Checkpoints.save))
        script('rcrl.py', *flags, f'--init_from={coin}/policy')
    script('rcrl.py', *flags, '--init_from=resume')
    for file in ('best/model.safetensors', 'last/model.safetensors'):
        assert (tmp_path / 'run' / file).read_bytes() == (learned / file).read_bytes()
    assert log_of(tmp_path / 'run')[-1] == log_of(learned)[-1]


def test_bad_input(script, coin, learned, tmp_path):
    def refused(*flags, match, command='rcrl.py'):
        done = script(command, f'--task={coin}/task', f'--out_dir={tmp_path}/run', '--device=cpu', *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr
        assert not (tmp_path / 'run').exists()

    policy = [f'--init_from={coin}/policy', f'--base={coin}/policy']
    refused(*policy, '--granularity=word', match="granularity is one of ('step', 'solution'), not 'word'")
    refused(*policy, '--threshold=0', match='threshold above 0')
    refused(*policy, '--right_share=1.5', match='right_share and good_share')
    refused(*policy, '--granularity=solution', '--good_share=0.5', match='right_share sets the mix')
    refused(policy[0], match='--base=out/demo_base')
    refused(*policy, '--n_questions=10000', match='n_questions')
    refused(policy[0], '--base=nowhere/at/all', match='nowhere/at/all')
    # who does not know what to tell it does not take a return-conditioned policy
    for command, flags in (('sft.py', []), ('ei.py', [policy[1]]), ('ppo.py', []), ('rewards.py', ['--kind=orm']), ('rcrl.py', [policy[1]])):
        refused(f'--init_from={learned}', *flags, match='is a return-conditioned policy', command=command)
    for command, flag in (('ei.py', '--base'), ('rewards.py', '--base'), ('rcrl.py', '--base'), ('ppo.py', '--ref'), ('ppo.py', '--critic_from')):
        kind = ['--kind=orm'] if command == 'rewards.py' else ['--max_new_tokens=40'] if command == 'ppo.py' else []
        refused(policy[0], f'{flag}={learned}', *kind, match='is a return-conditioned policy', command=command)
    refused(f'--init_from={coin}/policy', '--condition=bad', match='is for return-conditioned policies', command='eval.py')
    refused(f'--init_from={learned}', '--few_shot=2', match='takes no few_shot', command='eval.py')


def test_a_mix_that_cannot_be_had_says_so(script, coin, tmp_path):
    done = script('rcrl.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--base={coin}/policy', f'--out_dir={tmp_path}/run', *RUN, '--n_questions=1', '--k=1',
                  code=2)
    assert 'nothing to learn from: of 1 solutions' in done.stderr
