"""What a user asks, as tensors: checked and spread at once, for tests that call the compiled functions themselves."""

from tf_gpt2.generation import options


def make_sampling(n_prompts, config, n_samples=1, **asked):
    """How the rows of so many prompts choose."""
    options.check_names(asked)
    return options.check_sampling(n_prompts, config, n_samples, **asked).spread(n_prompts, n_samples)


def make_limits(rows, max_new_tokens, stop_ids, config):
    """When rows end."""
    return options.make_limits(
        rows, options.check_max_new_tokens(max_new_tokens), options.check_stop_ids(stop_ids, config), config
    )
