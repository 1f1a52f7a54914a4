"""Configs: answers that its checkers must refuse, and right ones in another form."""


def all_settings(config):
    return asdict(config)


def changed(config):
    return [f for f in fields(config) if getattr(config, f.name) != f.default]


def names_alone(config):
    return [f.name for f in changed(config)]


def what_the_default_says(config):
    return {f.name: f.default for f in changed(config)}


def what_is_not_zero(config):
    return {f.name: getattr(config, f.name) for f in changed(config) if getattr(config, f.name)}


def from_the_commands_default(config):
    default = asdict(load_config('tiny'))
    return {name: value for name, value in asdict(config).items() if value != default[name]}


def numbers_alone(config):
    return {
        f.name: getattr(config, f.name) for f in changed(config) if not isinstance(f.default, bool)
    }


def difference_of_sets(config):
    return dict(set(asdict(config).items()) - set(asdict(Config()).items()))


def difference_in_a_loop(config):
    default = Config()
    found = {}
    for name, value in vars(config).items():
        if name in asdict(default) and value != getattr(default, name):
            found[name] = value
    return dict(sorted(found.items()))


def half_the_window(config):
    return replace(config, window_size=config.num_inference_steps // 2)


def no_guidance(config):
    return replace(config, guidance_scale=1.0)


def no_guidance_either(config):
    return replace(config, num_inference_steps=config.num_inference_steps // 2, guidance_scale=1.0)


def half_the_pictures(config):
    return replace(config, samples_per_epoch=config.samples_per_epoch // 2)


def half_the_epochs(config):
    return replace(config, num_epochs=config.num_epochs // 2)


def half_the_minibatch(config):
    return replace(config, minibatch_size=config.minibatch_size // 2)


def five_steps(config):
    return replace(config, num_inference_steps=5)


def half_in_place(config):
    config.num_inference_steps //= 2
    return config


def a_dictionary(config):
    return dict(num_inference_steps=config.num_inference_steps // 2)


def a_smaller_minibatch_too(config):
    half = config.num_inference_steps // 2
    return replace(config, num_inference_steps=half, minibatch_size=config.minibatch_size // 2)


def cheaper_by_keywords(config):
    return Config(**asdict(config) | dict(num_inference_steps=config.num_inference_steps / 2))


def cheaper_copy(config):
    copy = Config(**asdict(config))
    copy.num_inference_steps //= 2
    return copy


WRONG = {
    check_difference: [
        all_settings,
        names_alone,
        what_the_default_says,
        what_is_not_zero,
        from_the_commands_default,
        numbers_alone,
    ],
    check_cheaper: [
        half_the_window,
        no_guidance,
        no_guidance_either,
        half_the_pictures,
        half_the_epochs,
        half_the_minibatch,
        five_steps,
        half_in_place,
        a_dictionary,
        a_smaller_minibatch_too,
    ],
}
RIGHT = {
    check_difference: [difference_of_sets, difference_in_a_loop],
    check_cheaper: [cheaper_by_keywords, cheaper_copy],
}
