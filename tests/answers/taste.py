"""Taste: answers that its checkers must refuse, and right ones in another form."""


def nobody_errs(ratio_w, ratio_l, beta, wrong):
    return dpo_loss(ratio_w, ratio_l, beta)


def chances_swapped(ratio_w, ratio_l, beta, wrong):
    return wrong * dpo_loss(ratio_w, ratio_l, beta) + (1 - wrong) * dpo_loss(ratio_l, ratio_w, beta)


def mixed_inside_the_log(ratio_w, ratio_l, beta, wrong):
    p = torch.sigmoid(beta * (ratio_w - ratio_l))
    return -((1 - wrong) * p + wrong * (1 - p)).log().mean()


def subtracted(ratio_w, ratio_l, beta, wrong):
    return (1 - wrong) * dpo_loss(ratio_w, ratio_l, beta) - wrong * dpo_loss(ratio_l, ratio_w, beta)


def a_smaller_margin(ratio_w, ratio_l, beta, wrong):
    return dpo_loss(ratio_w, ratio_l, (1 - 2 * wrong) * beta)


def one_for_each_pair(ratio_w, ratio_l, beta, wrong):
    margin = beta * (ratio_w - ratio_l)
    return -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)


def added_up(ratio_w, ratio_l, beta, wrong):
    return one_for_each_pair(ratio_w, ratio_l, beta, wrong).sum()


def overflows(ratio_w, ratio_l, beta, wrong):
    margin = beta * (ratio_w - ratio_l)
    return (-(1 - wrong) * margin.sigmoid().log() - wrong * (-margin).sigmoid().log()).mean()


def a_target(ratio_w, ratio_l, beta, wrong):
    margin = beta * (ratio_w - ratio_l)
    return F.binary_cross_entropy_with_logits(margin, torch.full_like(margin, 1 - wrong))


def a_slope_and_a_softplus(ratio_w, ratio_l, beta, wrong):
    margin = beta * (ratio_w - ratio_l)
    return (F.softplus(-margin) + wrong * margin).mean()


def any_prompts(names, votes):
    return [(i, j) for i in range(len(votes)) for j in range(len(votes)) if votes[i] > votes[j]]


def loser_first(names, votes):
    return [(j, i) for i, j in product_of_all(names, votes)]


def neighbours(names, votes):
    return [(i, j) for i, j in product_of_all(names, votes) if abs(i - j) == 1]


def later_losers(names, votes):
    return [(i, j) for i, j in product_of_all(names, votes) if i < j]


def each_once(names, votes):
    return list({i: (i, j) for i, j in product_of_all(names, votes)}.values())


def any_votes(names, votes):
    return [
        (i, j)
        for i in range(len(votes))
        for j in range(len(votes))
        if i != j and names[i] == names[j]
    ]


def product_of_all(names, votes):
    both = [(i, j) for i in range(len(votes)) for j in range(len(votes))]
    return [(i, j) for i, j in both if votes[i] > votes[j] and names[i] == names[j]]


def by_table(names, votes):
    names, votes = np.array(names), np.array(votes)
    return np.argwhere((names[:, None] == names) & (votes[:, None] > votes)).tolist()


WRONG = {
    check_unsure_loss: [
        nobody_errs,
        chances_swapped,
        mixed_inside_the_log,
        subtracted,
        a_smaller_margin,
        one_for_each_pair,
        added_up,
        overflows,
    ],
    check_couples: [any_prompts, loser_first, neighbours, later_losers, each_once, any_votes],
}
RIGHT = {
    check_unsure_loss: [a_target, a_slope_and_a_softplus],
    check_couples: [product_of_all, by_table],
}
