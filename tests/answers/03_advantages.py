"""Advantages: answers that its checkers must refuse, and right ones in another form."""


# ---- moving_advantages
def moved(prompts, rewards, means, rate):
    by_name = {p: rewards[[q == p for q in prompts]].mean() for p in prompts}
    return means | {p: (1 - rate) * means.get(p, m) + rate * m for p, m in by_name.items()}


def less(prompts, rewards, numbers):
    return rewards - np.array([numbers[p] for p in prompts])


def compared_first(prompts, rewards, means, rate):
    new = moved(prompts, rewards, means, rate)
    return less(prompts, rewards, new | means), new


def sample_by_sample(prompts, rewards, means, rate):
    new = dict(means)
    advantages = []
    for p, r in zip(prompts, rewards):
        new[p] = (1 - rate) * new.get(p, r) + rate * r
        advantages.append(r - new[p])
    return advantages, new


def rate_of_the_old(prompts, rewards, means, rate):
    new = moved(prompts, rewards, means, 1 - rate)
    return less(prompts, rewards, new), new


def mean_of_the_epoch(prompts, rewards, means, rate):
    new = moved(prompts, rewards, means, rate)
    return less(prompts, rewards, moved(prompts, rewards, {}, 1.0)), new


def drawn_ones_only(prompts, rewards, means, rate):
    new = {p: m for p, m in moved(prompts, rewards, means, rate).items() if p in prompts}
    return less(prompts, rewards, new), new


def changed_in_place(prompts, rewards, means, rate):
    means.update(moved(prompts, rewards, means, rate))
    return less(prompts, rewards, means), means


def one_mean_for_all(prompts, rewards, means, rate):
    new = means | {
        p: (1 - rate) * means.get(p, rewards.mean()) + rate * rewards.mean() for p in prompts
    }
    return less(prompts, rewards, new), new


def new_ones_from_zero(prompts, rewards, means, rate):
    new = moved(prompts, rewards, dict.fromkeys(prompts, 0.0) | means, rate)
    return less(prompts, rewards, new), new


def divided_by_the_spread(prompts, rewards, means, rate):
    new = moved(prompts, rewards, means, rate)
    return less(prompts, rewards, new) / (rewards.std() + 1e-6), new


def moving_tensors(prompts, rewards, means, rate):
    rewards = torch.tensor(rewards, dtype=torch.float32)
    means = {p: torch.tensor(m) for p, m in means.items()}
    for p in set(prompts):
        m = rewards[torch.tensor([q == p for q in prompts])].mean()
        means[p] = torch.lerp(means[p], m, rate) if p in means else m
    return rewards - torch.stack([means[p] for p in prompts]), means


def moving_list(prompts, rewards, means, rate):
    new = moved(prompts, rewards, means, rate)
    return [r - new[p] for p, r in zip(prompts, rewards)], new


# ---- pictures_needed
def rule_of_thumb(num_prompts, min_count, epoch):
    return 8 * -(-min_count * num_prompts // epoch // 8)


def not_in_eights(num_prompts, min_count, epoch):
    return pictures_needed_counted(num_prompts, min_count, epoch) - 1


def one_more(num_prompts, min_count, epoch):
    return pictures_needed_counted(num_prompts, min_count, epoch) + 8


def one_less(num_prompts, min_count, epoch):
    return pictures_needed_counted(num_prompts, min_count, epoch) - 8


def counted_from_0(num_prompts, min_count, epoch):
    return pictures_needed_counted(num_prompts, min_count, epoch + 1)


def per_prompt_only(num_prompts, min_count, epoch):
    return 8 * -(-min_count // epoch // 8)


def of_one_setting(num_prompts, min_count, epoch):
    return 168


def shares_with(per_epoch, num_prompts, min_count, epoch):
    sizes = dict(buffer_size=min_count, min_count=min_count)
    return active_shares(num_prompts, per_epoch, **sizes, epochs=epoch)


def mean_of_all_epochs(*setting):
    return next(n for n in range(8, 1000, 8) if shares_with(n, *setting).mean() >= 0.5)


def pictures_needed_counted(*setting):
    return next(n for n in range(8, 1000, 8) if shares_with(n, *setting)[-1] >= 0.5)


def pictures_as_tensor(*setting):
    return torch.tensor(pictures_needed_counted(*setting))


def pictures_as_numpy(*setting):
    return np.int64(pictures_needed_counted(*setting))


# ---- rank_advantages
def within_prompts(prompts, rewards, rank):
    out = np.zeros(len(rewards))
    for p in set(prompts):
        mine = np.array([q == p for q in prompts])
        out[mine] = rank(rewards[mine])
    return out


def spaced(places):
    return 2 * places / (len(places) - 1) - 1


def sorted_once(prompts, rewards):
    return within_prompts(prompts, rewards, lambda r: spaced(r.argsort()))


def over_everything(prompts, rewards):
    return spaced(rewards.argsort().argsort())


def best_is_lowest(prompts, rewards):
    return within_prompts(prompts, rewards, lambda r: spaced((-r).argsort().argsort()))


def from_0_to_1(prompts, rewards):
    return within_prompts(prompts, rewards, lambda r: r.argsort().argsort() / (len(r) - 1))


def not_to_the_end(prompts, rewards):
    return within_prompts(prompts, rewards, lambda r: 2 * r.argsort().argsort() / len(r) - 1)


def z_scores(prompts, rewards):
    return within_prompts(prompts, rewards, standardise)


def places_alone(prompts, rewards):
    return within_prompts(prompts, rewards, lambda r: r.argsort().argsort())


def stretched(prompts, rewards):
    return within_prompts(prompts, rewards, lambda r: 2 * (r - r.min()) / np.ptp(r) - 1)


def prompt_after_prompt(prompts, rewards):
    groups = [rewards[[q == p for q in prompts]] for p in dict.fromkeys(prompts)]
    return np.concatenate([spaced(r.argsort().argsort()) for r in groups])


def ranks_by_sorting(prompts, rewards):
    ranks = []
    for p, r in zip(prompts, rewards):
        mine = sorted(other for q, other in zip(prompts, rewards) if q == p)
        ranks.append(-1 + 2 * mine.index(r) / (len(mine) - 1))
    return ranks


def ranks_by_counting(prompts, rewards):
    rewards = torch.tensor(rewards)
    same = torch.tensor([[p == q for q in prompts] for p in prompts])
    below = (same & (rewards < rewards[:, None])).sum(1)
    above = (same & (rewards > rewards[:, None])).sum(1)
    return (below - above) / (below + above)


WRONG = {
    check_moving_advantages: [
        compared_first,
        sample_by_sample,
        rate_of_the_old,
        mean_of_the_epoch,
        drawn_ones_only,
        changed_in_place,
        one_mean_for_all,
        new_ones_from_zero,
        divided_by_the_spread,
    ],
    check_pictures_needed: [
        rule_of_thumb,
        not_in_eights,
        one_more,
        one_less,
        counted_from_0,
        per_prompt_only,
        of_one_setting,
        mean_of_all_epochs,
    ],
    check_rank_advantages: [
        sorted_once,
        over_everything,
        best_is_lowest,
        from_0_to_1,
        not_to_the_end,
        z_scores,
        places_alone,
        stretched,
        prompt_after_prompt,
    ],
}
RIGHT = {
    check_moving_advantages: [moving_tensors, moving_list],
    check_pictures_needed: [pictures_as_tensor, pictures_as_numpy],
    check_rank_advantages: [ranks_by_sorting, ranks_by_counting],
}
