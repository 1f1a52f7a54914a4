"""Pipelines: answers that its checkers must refuse, and right ones in another form."""


# ---- between
def two_prompts_only(a, b, n):
    return Context(torch.cat([a.text, b.text]), a.empty)


def mixed(a, b, weights):
    weights = torch.as_tensor(weights, dtype=a.text.dtype).view(-1, 1, 1)
    return Context((1 - weights) * a.text + weights * b.text, a.empty)


def from_b_to_a(a, b, n):
    return mixed(b, a, torch.linspace(0, 1, n))


def end_left_out(a, b, n):
    return mixed(a, b, torch.arange(n) / n)


def both_ends_left_out(a, b, n):
    return mixed(a, b, torch.arange(1, n + 1) / (n + 1))


def uneven(a, b, n):
    return mixed(a, b, torch.linspace(0, 1, n) ** 2)


def empty_too(a, b, n):
    out = mixed(a, b, torch.linspace(0, 1, n))
    return Context(out.text, a.empty.expand_as(out.text))


def empty_forgotten(a, b, n):
    return mixed(a, b, torch.linspace(0, 1, n)).text


def empty_of_b(a, b, n):
    return Context(mixed(a, b, torch.linspace(0, 1, n)).text, b.empty)


def weights_along_the_columns(a, b, n):
    weight = torch.linspace(0, 1, n)
    return Context((1 - weight) * a.text + weight * b.text, a.empty)


def only_the_difference(a, b, n):
    return Context(torch.linspace(0, 1, n).view(n, 1, 1) * (b.text - a.text), a.empty)


def by_loop(a, b, n):
    return Context(torch.cat([torch.lerp(a.text, b.text, i / (n - 1)) for i in range(n)]), a.empty)


def in_float64(a, b, n):
    weight = torch.linspace(0, 1, n, dtype=torch.float64)
    return Context(a.text + torch.einsum('n,bld->nld', weight, (b.text - a.text).double()), a.empty)


# ---- away_from
def unwanted_left_out(pipe, prompts, unwanted):
    return encode_prompts(pipe, prompts)


def changed_places(pipe, prompts, unwanted):
    return Context(
        encode_prompts(pipe, [unwanted] * len(prompts)).text, encode_prompts(pipe, prompts[:1]).text
    )


def its_empty_prompt(pipe, prompts, unwanted):
    return Context(encode_prompts(pipe, prompts).text, encode_prompts(pipe, [unwanted]).empty)


def in_the_prompt(pipe, prompts, unwanted):
    return encode_prompts(pipe, [f'{p}, not {unwanted}' for p in prompts])


def subtracted(pipe, prompts, unwanted):
    text, empty = encode_prompts(pipe, prompts)
    return Context(text - encode_prompts(pipe, [unwanted]).text, empty)


def one_for_each(pipe, prompts, unwanted):
    return Context(
        encode_prompts(pipe, prompts).text, encode_prompts(pipe, [unwanted] * len(prompts)).text
    )


def letter_by_letter(pipe, prompts, unwanted):
    return Context(encode_prompts(pipe, prompts).text, encode_prompts(pipe, unwanted).text)


def minus_the_unwanted(pipe, prompts, unwanted):
    return Context(encode_prompts(pipe, prompts).text, -encode_prompts(pipe, [unwanted]).text)


def by_the_library(pipe, prompts, unwanted):
    with torch.no_grad():
        text, negative = pipe.encode_prompt(
            prompts, pipe.device, 1, True, negative_prompt=[unwanted] * len(prompts)
        )
    return Context(text, negative[:1])


def all_at_once(pipe, prompts, unwanted):
    text = encode_prompts(pipe, [*prompts, unwanted]).text
    return Context(text[:-1], text[-1:])


WRONG = {
    check_between: [
        two_prompts_only,
        from_b_to_a,
        end_left_out,
        both_ends_left_out,
        uneven,
        empty_too,
        empty_of_b,
        empty_forgotten,
        weights_along_the_columns,
        only_the_difference,
    ],
    check_away_from: [
        unwanted_left_out,
        changed_places,
        its_empty_prompt,
        in_the_prompt,
        subtracted,
        one_for_each,
        letter_by_letter,
        minus_the_unwanted,
    ],
}
RIGHT = {
    check_between: [by_loop, in_float64],
    check_away_from: [by_the_library, all_at_once],
}
