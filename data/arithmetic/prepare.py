"""
The default task: word problems in GSM8K's form, made here, the same bytes on every machine, and small enough
for a model of a million parameters. Behind each story is a graph of quantities: the story's numbers, and the
results of operations on them. Additions and subtractions may be done in any order, so most stories have
several worked solutions; one of them is drawn, and so is the wording of each line.

train.jsonl, test.jsonl   rows {"question", "answer"}
base.jsonl                rows {"text"} for a base model: arithmetic facts, one-step problems with solutions,
                          stories with running totals, and questions of several steps without solutions. No
                          question of train or test is among them.

$ python data/arithmetic/prepare.py                              # a few seconds
$ python data/arithmetic/prepare.py --ops=+- --max_steps=3 --out=data/easy
"""
import itertools
import json
import os
import random
import sys
import tempfile
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import data
from config import UserError, override

# -----------------------------------------------------------------------------
seed = 0                  # another seed, other problems
n_train = 2756            # problems: the demo uses 500 solutions, 2,000 final answers, 256 validation rows
n_test = 2000             # problems, the same for every n_train; train is the same for every n_base
min_steps = 2             # operations per solution, from 1 to 6
max_steps = 3             # short problems are more frequent, see draw_steps
max_number = 20           # largest number in questions and solutions; the smallest is 2
ops = '+-*/'              # operations that a solution may use
distractor = 0.1          # probability of a sentence with a number that isn't needed
comparisons = 0.2         # share of problems that compare amounts; the others change one amount repeatedly
reorder = 0.25            # probability that a step is any possible one, instead of the story's next
n_base = 24256            # rows of base.jsonl
base_facts = 0.1          # share of rows that are arithmetic facts, three a row
base_one_step = 0.7       # share that are one-step problems with their solutions
base_tales = 0.15         # share that are stories with running totals; the rest are bare questions
out = ''                  # where the files go; '': beside this script
# -----------------------------------------------------------------------------
# Words. Slots: {P} the story's person, {S} the same or "He" where that is clear, {Q} and {R} other people;
# {o} what is counted, {u} {v} {x} {y} {z} other objects, {c} {d} containers, {w} a place; {n} {k} numbers,
# {a} times {b} a product; {e}, in the line of a solution, its annotated operation. No number is below 2, so
# that every plural is right.

NAMES = {'Tom': 'He', 'Ben': 'He', 'Sam': 'He', 'Max': 'He', 'Leo': 'He', 'Dan': 'He',
         'Ann': 'She', 'Eva': 'She', 'Mia': 'She', 'Zoe': 'She', 'Sue': 'She', 'Amy': 'She'}
OBJECTS = ['apples', 'pears', 'plums', 'nuts', 'pens', 'books',
           'cards', 'shells', 'balls', 'cups', 'hats', 'dolls']
CONTAINERS = ['bags', 'boxes', 'jars', 'baskets']
PLACES = ['in the park', 'at the pool', 'in the hall', 'in the yard']
VERBS = [('has', 'have'), ('has', 'have'), ('buys', 'buy'), ('finds', 'find'), ('sells', 'sell'),
         ('wins', 'win')]

# A ledger is an amount that events change: by a number (+ -), a product (+* -*), k-fold (*), by half (half).
# A tail, (operation, sentences, questions, lines), divides or multiplies the final amount, or asks how much
# is missing to a goal. Lines of a solution: a product; of a sum, the last operation (whole), one that includes
# the first term (part), one that doesn't (more), and one that adds up what is taken away (less).
LINES = {
    'ask': ['How many {o} does {P} have now?', 'How many {o} does {P} have in the end?'],
    'ask less': ['How many {o} does {P} have left?', 'How many {o} are left?'],
    'product': ['That is {e} {o}.', 'It makes {e} {o}.'],
    'part': ['{P} has {e} {o}.', 'That makes {e} {o}.', 'There are {e} {o} then.'],
    'more': ['That is {e} more {o}.', 'It makes {e} more {o}.'],
    'less': ['That is {e} fewer {o}.', 'So {e} {o} are gone.'],
    'whole': ['{P} has {e} {o} now.', 'So {P} has {e} {o}.', 'In the end there are {e} {o}.'],
}
THINGS = LINES | {
    'o': OBJECTS,
    'start': ['{P} has {n} {o}.', '{P} starts with {n} {o}.', 'At first {P} has {n} {o}.',
              '{P} keeps {n} {o} in a box.'],
    'start*': ['{P} has {a} {c} with {b} {o} in each.', '{P} fills {a} {c} with {b} {o} each.',
               '{P} has {a} {c} of {b} {o}.'],
    '+': ['{S} buys {n} more {o}.', '{S} finds {n} {o}.', '{Q} gives {P} {n} more {o}.',
          '{S} gets {n} {o} from {Q}.',
          'Then {P} wins {n} {o}.'],
    '+*': ['{S} buys {a} {c} of {b} {o}.', '{a} friends give {P} {b} {o} each.',
           '{S} finds {b} {o} a day for {a} days.'],
    '-': ['{S} gives {n} {o} to {Q}.', '{S} loses {n} {o}.', '{S} sells {n} {o}.',
          '{Q} takes {n} of the {o}.',
          'Then {P} leaves {n} {o} at school.'],
    '-*': ['{S} gives {b} {o} to each of {a} friends.', '{a} friends take {b} {o} each.',
           '{S} sells {b} {o} a day for {a} days.'],
    '*': ['Then {P} has {k} times as many {o} as before.', 'After a game {P} has {k} times as many {o}.'],
    'half': ['{S} gives half of the {o} to {Q}.', 'Then {P} loses half of the {o}.',
             '{S} sells half of the {o}.'],
    'tails': [('/', ['{S} packs all the {o} into {d} of {k}.'], ['How many {d} does {P} fill?'],
               ['{P} fills {e} {d}.', 'That needs {e} {d}.']),
              ('/', ['{S} shares all the {o} equally among {k} friends.',
                     '{k} friends get all the {o}, as many each.'],
               ['How many {o} does each friend get?'], ['Each friend gets {e} {o}.',
                                                        'Each one has {e} {o}.']),
              ('*', ['At last {P} sells all the {o} for {k} dollars each.'],
               ['How many dollars does {P} get?'],
               ['{P} gets {e} dollars.', 'The {o} bring {e} dollars.']),
              ('goal', ['{P} wants {n} {o} in all.', '{P} needs {n} {o} for a party.'],
               ['How many more {o} does {P} need?'],
               {'whole': ['{P} needs {e} more {o}.', 'So {e} {o} are missing.'],
                'part': ['{P} still needs {e} {o}.'],
                'less': ['{P} has {e} {o}.', 'There are {e} {o}.']})],
}
MONEY = LINES | {
    'o': ['dollars'],
    'start': ['{P} has {n} dollars.', 'At first {P} has {n} dollars.', '{P} leaves home with {n} dollars.'],
    'start*': ['{P} saves {b} dollars a week for {a} weeks.', '{P} earns {b} dollars a day for {a} days.'],
    '+': ['{S} earns {n} dollars.', '{S} finds {n} dollars.', '{Q} gives {P} {n} dollars.',
          '{S} gets {n} dollars for a coat.'],
    '+*': ['{S} sells {a} {v} for {b} dollars each.', '{S} works {a} hours for {b} dollars an hour.'],
    '-': ['{S} spends {n} dollars.', '{S} pays {n} dollars for lunch.', '{S} gives {n} dollars to {Q}.',
          '{S} loses {n} dollars.'],
    '-*': ['{S} buys {a} {x} for {b} dollars each.', '{S} buys {a} {y} that cost {b} dollars each.',
           '{S} gives {b} dollars to each of {a} friends.'],
    'half': ['{S} spends half of the money.', '{S} gives half of the money to {Q}.'],
    'tails': [('/', ['{S} spends all the money on {u} for {k} dollars each.'], ['How many {u} does {P} get?'],
               ['{P} gets {e} {u}.', 'That is enough for {e} {u}.']),
              ('/', ['{S} shares all the money equally among {k} friends.'],
               ['How many dollars does each friend get?'],
               ['Each friend gets {e} dollars.']),
              ('goal', ['{P} wants a bike for {n} dollars.', '{P} needs {n} dollars for a trip.'],
               ['How many more dollars does {P} need?'],
               {'whole': ['{P} needs {e} more dollars.'], 'part': ['{P} still needs {e} dollars.'],
                'less': ['{P} has {e} dollars.']})],
    'ask': ['How many dollars does {P} have now?', 'How much money does {P} have in the end?'],
    'ask less': ['How many dollars does {P} have left?', 'How much money is left?'],
}
CHILDREN = LINES | {
    'o': ['children'],
    'start': ['There are {n} children {w}.', '{n} children play {w}.',
              'In the morning {n} children are {w}.'],
    'start*': ['There are {a} groups of {b} children {w}.', '{a} teams of {b} children play {w}.'],
    '+': ['{n} more children come.', 'Then {n} other children arrive.', 'A bus brings {n} more children.'],
    '+*': ['{a} groups of {b} children arrive.', '{a} cars bring {b} more children each.'],
    '-': ['{n} children leave.', '{n} of the children go home.', 'Then a bus takes {n} children home.'],
    '-*': ['{a} groups of {b} children leave.', '{a} cars take {b} children home each.'],
    '*': ['Soon there are {k} times as many children.',
          'At noon there are {k} times as many children as before.'],
    'half': ['Half of the children go home.', 'Then half of the children leave.'],
    'tails': [('/', ['The children form teams of {k}.'], ['How many teams are there?'],
               ['There are {e} teams.', 'They form {e} teams.']),
              ('/', ['The children sit at {k} tables, as many at each.'],
               ['How many children sit at each table?'],
               ['{e} children sit at each table.', 'Each table has {e} children.']),
              ('*', ['Each child gets {k} {x}.'], ['How many {x} do the children get in all?'],
               ['The children get {e} {x}.']),
              ('goal', ['There are {n} chairs for the children.'], ['How many chairs stay free?'],
               {'whole': ['{e} chairs stay free.', 'There are {e} free chairs.'],
                'part': ['That leaves {e} chairs.'],
                'less': ['There are {e} children.']})],
    'ask': ['How many children are there now?', 'How many children are {w} now?',
            'How many children are there in the end?'],
    'ask less': ['How many children are left?', 'How many children stay?'],
    'part': ['There are {e} children.', 'That makes {e} children.'],
    'whole': ['Now there are {e} children.', 'So there are {e} children.',
              'In the end {e} children are there.'],
}
LEDGERS = [THINGS, MONEY, CHILDREN]

# Amounts to compare: of several people, of several objects, or both. B follows from A by an operation. ref is
# the other amount's name in a comparison: Tom has more pens than {Ann}, more pens than {cups}.
AMOUNTS = {
    'given': '{A.who} {has} {n} {A.what}.',
    'given*': ['{A.who} {has} {a} {c} with {b} {A.what} in each.', '{A.who} {has} {a} {c} of {b} {A.what}.'],
    'given both': '{A.who} {has} {m} {A.what} and {n} {B.what}.',
    '+': ['{B.who} {has} {n} more {B.what} than {A.ref}.', '{A.who} {has} {n} fewer {A.what} than {B.ref}.'],
    '-': ['{B.who} {has} {n} fewer {B.what} than {A.ref}.', '{A.who} {has} {n} more {A.what} than {B.ref}.'],
    '*': ['{B.who} {has} {n} times as many {B.what} as {A.ref}.'],
    '*2': ['{B.who} {has} twice as many {B.what} as {A.ref}.',
           '{A.who} {has} half as many {A.what} as {B.ref}.'],
    '/': ['{A.who} {has} {n} times as many {A.what} as {B.ref}.'],
    '/2': ['{B.who} {has} half as many {B.what} as {A.ref}.',
           '{A.who} {has} twice as many {A.what} as {B.ref}.'],
    'tails': [('/', ['The {objects} are packed into {d} of {k}.'], ['How many {d} are there?'],
               ['There are {e} {d}.', 'They fill {e} {d}.']),
              ('*', ['The {objects} are worth {k} dollars each.'],
               ['How many dollars are they worth in all?'],
               ['They are worth {e} dollars.', 'That is {e} dollars.'])],
    'ask last': ['How many {B.what} does {B.who} {have}?'],
    'ask total': ['How many {objects} {do} {they} {have} in all?',
                  'How many {objects} {do} {they} {have} together?'],
    'ask more': ['How many more {B.what} does {B.who} {have} than {A.ref}?',
                 'How many fewer {A.what} does {A.who} {have} than {B.ref}?'],
    'step': ['{B.who} {has} {e} {B.what}.', 'That is {e} {B.what} for {B.who}.'],
    'part': ['That makes {e} {things}.', 'That is {e} {things} so far.'],
    'whole': ['In all that is {e} {things}.', 'Together that is {e} {things}.'],
    'difference': ['{B.who} {has} {e} more {B.what}.', 'The difference is {e} {B.what}.'],
}
DISTRACTORS = ['{P} is {age} years old.', 'The way home takes {n} minutes.',
               'There are {n} trees on the way.',
               'It is {n} days to the holidays.']
MORE_DISTRACTORS = ['{R} has {n} {z}.', '{P} also has {n} {z}.']  # unless the question asks for a total
FACTS = {'+': ['{a} plus {b} is {c}.', '{a} and {b} make {c}.'],
         '-': ['{a} minus {b} is {c}.', '{b} from {a} leaves {c}.'],
         '*': ['{a} times {b} is {c}.', '{a} groups of {b} make {c}.'],
         '/': ['{a} divided by {b} is {c}.', '{a} in groups of {b} make {c} groups.']}

TRIES = 20000             # failed stories or repeated problems before giving up: a second or two
WORK = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__, '/': int.__floordiv__}
# a ledger's events and the operations that each needs; the frequent ones are repeated
EVENTS = [('+', '+'), ('+', '+'), ('-', '-'), ('-', '-'), ('+*', '+*'), ('-*', '-*'), ('*', '*'),
          ('half', '/')]


class DeadEnd(Exception):
    """A story that can't go on with its numbers, operations and steps. Another one is tried."""


# -----------------------------------------------------------------------------
# The graph behind a story. A quantity is an int, a number from the story, or a Result.

class Result:
    """
    The result of len(terms) - 1 operations. terms: [(op, quantity)], the first op +; either all are + and -,
    in any order, or there are two, the second with * or /. lines: forms for the solution, see THINGS; slots:
    their words.
    """

    def __init__(self, terms, lines, slots):
        self.terms, self.lines, self.slots, self.value = terms, lines, slots, 0
        for op, quantity in terms:
            self.value = WORK[op](self.value, value(quantity))


def value(quantity):
    return quantity if isinstance(quantity, int) else quantity.value


def annotated(op, a, b):
    """'+', 3, 4 -> '3+4=<<3+4=7>>7'"""
    c = WORK[op](a, b)
    return f'{a}{op}{b}=<<{a}{op}{b}={c}>>{c}'


def solve(rng, root, slots, ops='+-*/', reorder=1.0):
    """-> the lines of a solution, one operation each: the next one in the story's order or, with probability
    reorder, any whose operands are known by then."""
    results, lines = [root], []
    for result in results:        # grows as it is read
        results += [q for _, q in result.terms if isinstance(q, Result) and q not in results]
    terms = {id(result): list(result.terms) for result in results}  # those not yet used
    while results:
        moves = []
        for result in results:
            known = [(i, op, value(q)) for i, (op, q) in enumerate(terms[id(result)]) if q not in results]
            # a move: * or /, the sum of two terms of one sign, or the difference of two of opposite signs
            moves += [(result, i, j) for i, p, a in known for j, q, b in known if i < j and (
                q in '*/' or (p == q and '+' in ops) or (p != q and (a - b if p == '+' else b - a) >= 2))]
        next_one = results[0], 0, 1
        while (unknown := next((q for _, q in terms[id(next_one[0])][:2] if q in results), None)) is not None:
            next_one = unknown, 0, 1
        result, i, j = rng.choice(moves) if rng.random() < reorder or next_one not in moves else next_one
        left = terms[id(result)]
        (p, a), (q, b) = left[i], left.pop(j)
        if p == '-' and q == '+':
            (p, a), (q, b) = (q, b), (p, a)
        op = '+' if p == q else q
        left[i] = p, WORK[op](value(a), value(b))
        if len(left) == 1:
            results.remove(result)
        kind = 'whole' if len(left) == 1 else 'part' if i == 0 else 'less' if p == '-' else 'more'
        form = rng.choice(result.lines.get(kind) or result.lines['part'])
        lines.append(form.format_map(slots | result.slots | {'e': annotated(op, value(a), value(b))}))
    return lines


# -----------------------------------------------------------------------------
# Stories

class Amount(NamedTuple):
    """See AMOUNTS."""
    who: str
    what: str
    ref: str = ''


class Story:
    """What a story has said so far, and draws for what it says next. A draw from nothing is a DeadEnd."""

    def __init__(self, rng, max_number, ops):
        self.rng, self.max_number, self.ops = rng, max_number, ops
        self.sentences = []       # (form, slots)
        self.people, self.things = rng.sample(list(NAMES), 4), rng.sample(OBJECTS, 5)
        self.slots = dict(zip('PQR', self.people)) | dict(zip('uvxyz', self.things))
        self.slots |= dict(zip('cd', rng.sample(CONTAINERS, 2))) | {'w': rng.choice(PLACES)}

    def choice(self, options):
        if not options:
            raise DeadEnd
        return self.rng.choice(options)

    def number(self, low, high):
        if low > high:
            raise DeadEnd
        return self.rng.randint(low, high)

    def product(self, room):
        """-> two factors, at most 6 and 12, whose product is at most room."""
        a = self.number(2, min(6, room // 2))
        return a, self.number(2, min(12, room // a))

    def operand(self, op, amount):
        """-> a number such that amount op number is in the range; 2 to 6 for * and /."""
        if op in '+-':
            return self.number(2, self.max_number - amount if op == '+' else amount - 2)
        most = min(6, self.max_number // amount if op == '*' else amount // 2)
        return self.choice([k for k in range(2, most + 1) if op == '*' or amount % k == 0])

    def say(self, forms, **slots):
        """Adds a sentence of a form that wasn't used yet."""
        used = [form for form, _ in self.sentences]
        self.sentences.append((self.choice([form for form in forms if form not in used]), slots))

    def result(self, terms, lines, last=True, **slots):
        """-> a Result, or the only term. lines: a list for one operation. last: is this the answer?"""
        if len(terms) == 1:
            return terms[0][1]
        if isinstance(lines, list):
            lines = {'whole': lines}
        result = Result(terms, lines if last else lines | {'whole': lines['part']}, slots)
        if not 2 <= result.value <= self.max_number or any(op not in self.ops for op, _ in terms[1:]):
            raise DeadEnd
        return result

    def end(self, tail, terms, lines):
        """Says a tail about the sum of these terms. -> (root, questions)"""
        op, sentences, questions, tail_lines = tail
        whole = self.result(terms, lines, last=False)
        if op != 'goal':
            k = self.operand(op, value(whole))
            self.say(sentences, k=k)
            return self.result([('+', whole), (op, k)], tail_lines), questions
        goal = self.number(value(whole) + 2, self.max_number)
        told = [n for _, slots in self.sentences for n in slots.values() if isinstance(n, int)]
        self.say(sentences, n=goal)
        if goal > max(told) and self.rng.random() < 0.5:
            self.sentences.insert(0, self.sentences.pop())
        if any(op == '-' for op, _ in terms) or self.rng.random() < 0.5:
            terms = [('+', whole)]
        return self.result([('+', goal)] + [('-', q) for _, q in terms], tail_lines), questions


def ledger(story, n, with_tail=True):
    """An amount that n operations change. -> (root, questions)"""
    rng, forms = story.rng, story.rng.choice(LEDGERS)
    story.slots['o'] = rng.choice([o for o in forms['o'] if o not in story.things])
    tails = [tail for tail in forms['tails'] if tail[0].replace('goal', '-') in story.ops]
    tail = rng.choice(tails) if tails and rng.random() < 0.5 and with_tail else None
    n -= tail is not None
    if n and '*' in story.ops and rng.random() < 0.3:
        a, b = story.product(story.max_number)
        story.say(forms['start*'], a=a, b=b)
        terms, n = [('+', story.result([('+', a), ('*', b)], forms['product']))], n - 1
    else:
        terms = [('+', story.number(2, story.max_number * 4 // 5))]
        story.say(forms['start'], n=terms[0][1])
    event = 'start'
    while n:
        now = sum(value(q) if op == '+' else -value(q) for op, q in terms)
        # additions alone must stay within the range: then they do in every order
        room = story.max_number - sum(value(q) for op, q in terms if op == '+')
        event, needs = story.choice([
            (event, needs) for event, needs in EVENTS
            if event in forms and len(needs) <= n and all(op in story.ops for op in needs)])
        n -= len(needs)
        if event in ('*', 'half'):
            k = 2 if event == 'half' else story.operand('*', now)
            if event == 'half' and now % 2:
                raise DeadEnd
            story.say(forms[event], k=k)
            before = story.result(terms, forms, last=False)
            kind = 'part' if n or tail else 'whole'
            terms = [('+', story.result([('+', before), (needs, k)], forms[kind]))]
        elif event[1:]:
            a, b = story.product(room if event == '+*' else now - 2)
            story.say(forms[event], a=a, b=b)
            terms.append((event[0], story.result([('+', a), ('*', b)], forms['product'])))
        else:
            terms.append((event, story.number(2, room if event == '+' else now - 2)))
            story.say(forms[event], n=terms[-1][1])
    if tail:
        return story.end(tail, terms, forms)
    return story.result(terms, forms), forms['ask less' if event[0] in '-h' else 'ask']


def pair(a, b):
    """-> the slots A and B of a comparison."""
    same = a.who == b.who
    return {'A': a._replace(ref=a.what if same else a.who), 'B': b._replace(ref=b.what if same else b.who)}


def compare(story, n):
    """Amounts, some given, some relative to others. The question is for one, a difference, or the total."""
    rng, forms = story.rng, AMOUNTS
    n_people, n_things = rng.choice([(4, 1), (1, 4), (2, 2)])
    square = n_people == 2        # then the difference is between two people's totals
    who = [Amount(person, thing) for person in story.people[:n_people] for thing in story.things[:n_things]]
    shapes = []  # how many amounts, first one a product?, how many relative ones, question, a tail?
    for many, first, follow, ask, tail in itertools.product(
            (2, 3, 4), (0, 1), range(4), ('last', 'more', 'total'), (0, 1)):
        steps = first + follow + {'last': 0, 'more': 3 if square else 1, 'total': many - 1}[ask] + tail
        chain = follow == many - 1 or (many, follow, ask) == (2, 0, 'more')  # every amount is needed
        fits = many == 4 and ask != 'last' if square else ask == 'total' or chain
        if fits and steps == n and follow < many and (ask == 'total' or not tail):
            shapes.append((many, first, follow, ask, tail))
    many, first, follow, ask, tail = story.choice(shapes)
    has, have = rng.choice(VERBS)
    do, they = ('does', who[0].who) if n_people == 1 else ('do', 'they')
    objects = list(dict.fromkeys(amount.what for amount in who[:many]))
    listed = ' and '.join([', '.join(objects[:-1])] * (len(objects) > 1) + objects[-1:])
    story.slots |= {'has': has, 'have': have, 'do': do, 'they': they, 'objects': listed,
                    'things': 'things' if objects[1:] else objects[0]}
    follows = rng.sample(range(1, many), follow)
    amounts, used = [], ''
    for i, b in enumerate(who[:many]):
        if i in follows:
            near = [j for j in range(i) if who[j].who == b.who or who[j].what == b.what]
            j = i - 1 if ask == 'last' or ask == 'more' and not square else rng.choice(near)
            op = story.choice(story.ops)
            k = story.operand(op, value(amounts[j]))
            story.say(forms[op] + (forms[op + '2'] if k == 2 and op in '*/' else []), n=k, **pair(who[j], b))
            amounts.append(story.result([('+', amounts[j]), (op, k)], forms['step'], B=b))
            used += op
        elif first and i == 0:
            m, k = story.product(story.max_number)
            story.say(forms['given*'], A=b, a=m, b=k)
            amounts.append(story.result([('+', m), ('*', k)], forms['step'], B=b))
        else:
            form, slots = forms['given'], {'A': b, 'n': story.number(2, story.max_number * 2 // many)}
            amounts.append(slots['n'])
            if i and who[i - 1].who == b.who and story.sentences[-1][0] == form and rng.random() < 0.7:
                form = forms['given both']
                slots = {'A': who[i - 1], 'm': amounts[-2], 'B': b, 'n': amounts[-1]}
                story.sentences.pop()
            story.sentences.append((form, slots))
    if rng.random() < 0.3:
        rng.shuffle(story.sentences)
    if ask == 'last':
        story.slots['B'] = who[many - 1]
        return amounts[-1], forms['ask last']
    if ask == 'total':
        terms = [('+', amount) for amount in amounts]
        if tail:
            return story.end(rng.choice(forms['tails']), terms, forms)
        return story.result(terms, forms), forms['ask total']
    ends = [(amounts[0], who[0]), (amounts[-1], who[many - 1])]
    if square:
        both = [Amount(person, 'things') for person in story.people[:2]]
        ends = [(story.result([('+', amounts[i]), ('+', amounts[i + 1])], forms['step'], B=b), b)
                for i, b in zip((0, 2), both)]
    elif used and not set(used) & set('*/'):
        raise DeadEnd             # "Ann has 5 more pens than Tom" would give away the answer
    (low, a), (high, b) = sorted(ends, key=lambda end: value(end[0]))
    story.slots |= pair(a, b)
    return story.result([('+', high), ('-', low)], forms['difference']), forms['ask more']


def tell(story, questions, distractor):
    """-> the question's text."""
    rng = story.rng
    if rng.random() < distractor:
        form = rng.choice(DISTRACTORS + (MORE_DISTRACTORS if 'objects' not in story.slots else []))
        slots = {'n': rng.randint(2, story.max_number), 'age': min(rng.randint(6, 15), story.max_number)}
        story.sentences.insert(rng.randint(0, len(story.sentences)), (form, slots))
    texts, clear = [], False      # clear: the previous sentence names only {P}, so "He" is unambiguous
    for form, slots in story.sentences + [(rng.choice(questions), {})]:
        subject = NAMES[story.slots['P']] if clear and rng.random() < 0.7 else story.slots['P']
        texts.append(form.format_map(story.slots | slots | {'S': subject}))
        clear = ('{P}' in form or '{S}' in form) and '{Q}' not in form
    return ' '.join(texts)


def make_story(rng, n_steps, max_number=30, ops='+-*/', distractor=0.1, comparisons=0.2):
    """-> (question, root, slots), the last two for solve(). UserError if these settings allow no story."""
    for _ in range(TRIES):
        story = Story(rng, max_number, ops)
        try:
            root, questions = (compare if rng.random() < comparisons else ledger)(story, n_steps)
        except DeadEnd:
            continue
        return tell(story, questions, distractor), root, story.slots
    raise UserError(f'no problem of {n_steps} steps can be made with ops={ops} and max_number={max_number}')


def make_problem(rng, n_steps, max_number=30, ops='+-*/', distractor=0.1, comparisons=0.2, reorder=0.25):
    """-> (question, answer) in GSM8K's form, n_steps lines before the last one. UserError like make_story."""
    question, root, slots = make_story(rng, n_steps, max_number, ops, distractor, comparisons)
    return question, '\n'.join(solve(rng, root, slots, ops, reorder) + [f'#### {root.value}'])


# -----------------------------------------------------------------------------
# Files

def make_tale(rng, n_steps, max_number=30, ops='+-*/'):
    """-> a story without a question, told with running totals: each sentence is followed by its steps."""
    while True:
        story = Story(rng, max_number, ops)
        try:
            root, _ = ledger(story, n_steps, with_tail=False)
        except DeadEnd:
            continue
        lines, texts = solve(rng, root, story.slots, ops, reorder=0), []
        for form, slots in story.sentences:
            texts.append(form.format_map(story.slots | slots | {'S': story.slots['P']}))
            # a product is a step, and so is each change after the start
            for _ in range(('a' in slots) + (len(texts) > 1)):
                texts.append(lines.pop(0))
        return ' '.join(texts)


def make_fact(rng, max_number, op):
    """An arithmetic fact, as an annotation or as a sentence. Here numbers begin at 1."""
    a = rng.randint(1, max_number - 1 if op in '+-' else int(max_number ** 0.5))  # one factor <= the root
    b = rng.randint(1, max_number - a if op in '+-' else max_number // a)
    if rng.random() < 0.5:
        a, b = b, a
    a = {'+': a, '-': a + b, '*': a, '/': a * b}[op]
    if rng.random() < 0.6:
        return annotated(op, a, b)
    return rng.choice(FACTS[op]).format(a=a, b=b, c=WORK[op](a, b))


def draw_steps(rng, steps):
    """-> the smallest of three draws from steps = (from, to). For (2, 4): 2 in 19 of 27, 4 in 1 of 27."""
    return min(rng.randint(*steps) for _ in range(3))


def make_problems(rng, count, steps, seen, knobs):
    """-> count rows of steps = (from, to) operations. Skips questions in seen, adds the new ones."""
    rows, misses = [], 0
    while len(rows) < count:
        question, answer = make_problem(rng, draw_steps(rng, steps), *knobs)
        if question not in seen:
            seen.add(question)
            rows.append({'question': question, 'answer': answer})
            misses = 0
        elif misses == TRIES:
            raise UserError(f'{count:,} different problems are asked for, but only {len(rows):,} were found')
        else:
            misses += 1
    return rows


def make_base(rng, count, facts, one_step, tales, steps, seen, knobs):
    """-> count rows {"text"}, shuffled. facts, one_step, tales: their shares. Skips questions in seen."""
    n_facts, n_one, n_tales = round(count * facts), round(count * one_step), round(count * tales)
    kinds = [op for op in knobs[1] for _ in range(3 if op in '+-' else 1)]  # more sums than products
    texts = [' '.join(make_fact(rng, knobs[0], rng.choice(kinds)) for _ in range(3)) for _ in range(n_facts)]
    texts += [data.prompt(row['question']) + data.completion(row['answer'])
              for row in make_problems(rng, n_one, (1, 1), seen, knobs)]
    texts += [make_tale(rng, draw_steps(rng, steps), *knobs[:2]) for _ in range(n_tales)]
    texts += [row['question'] for row in make_problems(rng, max(0, count - len(texts)), steps, seen, knobs)]
    rng.shuffle(texts)
    return [{'text': text} for text in texts]


if __name__ == '__main__':
    override(globals())
    shares = (base_facts, base_one_step, base_tales)
    for fine, wanted in (
            (1 <= min_steps <= max_steps <= 6, '1 <= min_steps <= max_steps <= 6'),
            (ops and all(op in WORK and ops.count(op) == 1 for op in ops), 'ops of + - * /, each once'),
            (max_number >= 4, 'a max_number of 4 or more'),
            (all(0 <= p <= 1 for p in (distractor, comparisons, reorder)),
             'probabilities as distractor, comparisons and reorder'),
            (min(n_train, n_test, n_base) >= 0, 'counts as n_train, n_test and n_base'),
            (min(shares) >= 0 and sum(shares) <= 1 + 1e-9,
             'base_facts, base_one_step and base_tales that are shares of 1')):
        if not fine:
            raise UserError(f'these settings make no data: {wanted} needed')
    steps, seen = (min_steps, max_steps), set()
    knobs = (max_number, ops, distractor, comparisons, reorder)
    files = {'test': make_problems(random.Random(f'{seed} test'), n_test, steps, seen, knobs),
             'train': make_problems(random.Random(f'{seed} train'), n_train, steps, seen, knobs),
             'base': make_base(random.Random(f'{seed} base'), n_base, *shares, steps, seen, knobs)}
    folder = out or HERE
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:  # all three files, complete, or none
        for name, rows in files.items():
            with open(os.path.join(tmp, name), 'w', encoding='utf-8', newline='\n') as f:
                f.writelines(json.dumps(row) + '\n' for row in rows)
        for name in files:
            os.replace(os.path.join(tmp, name), os.path.join(folder, f'{name}.jsonl'))
    print(f'{n_train:,} train and {n_test:,} test problems of {min_steps} to {max_steps} steps '
          f'({ops}, at most {max_number})')
    print(f'{n_base:,} rows of text for a base model; all written to {folder}')
    if n_train:
        print('\n{question}\n{answer}'.format(**files['train'][0]))
