"""Prompts: answers that its checkers must refuse, and right ones in another form."""


def small_letters_only(noun):
    if noun.startswith(('uni', 'eu', 'use', 'one')):
        return 'a ' + noun
    if noun.startswith(('hour', 'honest', 'heir')):
        return 'an ' + noun
    return with_article(noun)


def first_list_only(noun):
    if noun.lower().startswith(('uni', 'eu', 'use', 'one')):
        return 'a ' + noun
    return with_article(noun)


def second_list_only(noun):
    if noun.lower().startswith(('hour', 'honest', 'heir')):
        return 'an ' + noun
    return with_article(noun)


def anywhere(noun):
    if any(part in noun.lower() for part in ('uni', 'eu', 'use', 'one')):
        return 'a ' + noun
    if any(part in noun.lower() for part in ('hour', 'honest', 'heir')):
        return 'an ' + noun
    return with_article(noun)


def whole_words(noun):
    if noun.lower() in ('unicorn', 'european', 'used', 'one'):
        return 'a ' + noun
    if noun.lower() in ('hour', 'honest', 'heir'):
        return 'an ' + noun
    return with_article(noun)


def in_small_letters(noun):
    return RIGHT[check_article_by_sound][0](noun.lower())


def article_alone(noun):
    return RIGHT[check_article_by_sound][0](noun).split()[0]


def by_letters(noun):
    return with_article(noun)


def loop_over_beginnings(noun):
    exceptions = dict.fromkeys(('uni', 'eu', 'use', 'one'), 'a') | dict.fromkeys(
        ('hour', 'honest', 'heir'), 'an'
    )
    for start, article in exceptions.items():
        if noun[: len(start)].casefold() == start:
            return f'{article} {noun}'
    return f'{"an" if noun[0].casefold() in "aeiou" else "a"} {noun}'


def without_weights(prompts, weights, n, rng):
    return draw_prompts(prompts, n, rng)


def roots_of_weights(prompts, weights, n, rng):
    shares = np.sqrt(weights)
    return [prompts[i] for i in rng.choice(len(prompts), size=n, p=shares / shares.sum())]


def shares_dealt(prompts, weights, n, rng):
    counts = np.round(np.array(weights) / sum(weights) * n).astype(int)
    return rng.permutation(np.repeat(prompts, counts)).tolist()


def drawn_and_sorted(prompts, weights, n, rng):
    return [
        prompts[i]
        for i in sorted(rng.choice(len(prompts), size=n, p=np.array(weights) / sum(weights)))
    ]


def hidden_state(prompts, weights, n, rng):
    return random.choices(prompts, weights, k=n)


def seed_of_its_own(prompts, weights, n, rng):
    return RIGHT[check_draw_weighted][1](prompts, weights, n, np.random.default_rng(0))


def sums_to_the_right(prompts, weights, n, rng):
    sums = np.cumsum(weights) / sum(weights)
    return [
        prompts[min(i + 1, len(prompts) - 1)]
        for i in np.searchsorted(sums, rng.random(n), side='right')
    ]


def one_at_a_time(prompts, weights, n, rng):
    return [rng.choice(prompts, p=np.array(weights) / sum(weights)) for _ in range(n)]


def by_sums(prompts, weights, n, rng):
    sums = np.cumsum(weights)
    return np.array(prompts)[np.searchsorted(sums, rng.random(n) * sums[-1], side='right')]


def from_a_long_list(prompts, weights, n, rng):
    longer = [p for p, w in zip(prompts, weights) for _ in range(int(w))]
    return [longer[i] for i in rng.integers(len(longer), size=n)]


def no_last_shuffle(prompts, n, rng):
    return [str(p) for _ in range(-(-n // len(prompts))) for p in rng.permutation(prompts)][:n]


def no_shuffle(prompts, n, rng):
    return (prompts * (n // len(prompts) + 1))[:n]


def shuffled_once(prompts, n, rng):
    return (rng.permutation(prompts).tolist() * (n // len(prompts) + 1))[:n]


def extra_for_the_first(prompts, n, rng):
    return rng.permutation((prompts * (n // len(prompts) + 1))[:n]).tolist()


def with_replacement(prompts, n, rng):
    return draw_prompts(prompts, n, rng)


def whole_rounds(prompts, n, rng):
    return rng.permutation(prompts * max(1, n // len(prompts))).tolist()


def extra_drawn_with_replacement(prompts, n, rng):
    return rng.permutation(
        prompts * (n // len(prompts)) + rng.choice(prompts, n % len(prompts)).tolist()
    ).tolist()


def hidden_shuffle(prompts, n, rng):
    names = random.sample(prompts, len(prompts)) * (n // len(prompts) + 1)
    return random.sample(names[:n], n)


def sorted_deal(prompts, n, rng):
    return sorted(RIGHT[check_deal_prompts][0](prompts, n, rng))


def extra_without_replacement(prompts, n, rng):
    times, more = divmod(n, len(prompts))
    dealt = prompts * times + rng.choice(prompts, more, replace=False).tolist()
    rng.shuffle(dealt)
    return dealt


def shuffled_list_repeated(prompts, n, rng):
    names = rng.permutation(prompts)
    return rng.permutation(np.resize(names, n))


WRONG = {
    check_article_by_sound: [
        small_letters_only,
        first_list_only,
        second_list_only,
        anywhere,
        whole_words,
        in_small_letters,
        article_alone,
        by_letters,
    ],
    check_draw_weighted: [
        without_weights,
        roots_of_weights,
        shares_dealt,
        drawn_and_sorted,
        hidden_state,
        seed_of_its_own,
        sums_to_the_right,
    ],
    check_deal_prompts: [
        no_last_shuffle,
        no_shuffle,
        shuffled_once,
        extra_for_the_first,
        with_replacement,
        whole_rounds,
        extra_drawn_with_replacement,
        hidden_shuffle,
        sorted_deal,
    ],
}
RIGHT = {
    check_article_by_sound: [loop_over_beginnings],
    check_draw_weighted: [one_at_a_time, by_sums, from_a_long_list],
    check_deal_prompts: [extra_without_replacement, shuffled_list_repeated],
}
