"""Vectors of gymnasium's environments, Atari's with the preprocessing of Mnih et al. (2015)."""

from __future__ import annotations

from typing import Any

from optuna_ohgw.errors import UserError


def make_environments(name: str, count: int, most: int | None) -> Any:
    """Return ``count`` environments in one, each begun anew in the step in which its episode ends.

    Args:
        name: As gymnasium registers it; those of Atari begin with ``ALE/``.
        count: How many.
        most: Steps after which an episode is cut off; None: the environment's own.

    Raises:
        UserError: If it is unknown, or Atari's emulator is not installed.
    """
    import gymnasium
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    atari = name.startswith("ALE/")
    if atari:
        try:
            import ale_py
        except ModuleNotFoundError as error:
            raise UserError(
                f"task.environment: {name!r} needs ale-py, which is not installed; "
                "pip install 'optuna-ohgw[rl]'"
            ) from error
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gymnasium.register_envs(ale_py)

    def one() -> Any:
        if not atari:
            return gymnasium.make(name, max_episode_steps=most)
        made = gymnasium.make(name, frameskip=1, repeat_action_probability=0.25)
        screened = gymnasium.wrappers.AtariPreprocessing(made, scale_obs=True)
        stacked = gymnasium.wrappers.FrameStackObservation(screened, 4)
        return stacked if most is None else gymnasium.wrappers.TimeLimit(stacked, most)

    try:
        return SyncVectorEnv([one] * count, autoreset_mode=AutoresetMode.SAME_STEP)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        reason = str(error).splitlines()[0]
        if atari and isinstance(error, gymnasium.error.DependencyNotInstalled):
            raise UserError(
                f"task.environment: {name!r} cannot be made ({reason}); pip install 'optuna-ohgw[rl]'"
            ) from error
        raise UserError(f"task.environment: {name!r} cannot be made ({reason}); give another") from error


def shape_of(environments: Any, name: str) -> tuple[tuple[int, ...], int]:
    """Return the shape of an observation and the number of actions.

    Raises:
        UserError: If the actions are not one choice of several.
    """
    from gymnasium.spaces import Box, Discrete

    seen, acts = environments.single_observation_space, environments.single_action_space
    if not isinstance(acts, Discrete) or not isinstance(seen, Box):
        raise UserError(
            f"task.environment: {name!r} has observations {seen} and actions {acts}; "
            "give one with numbers to see and one choice to make"
        )
    return tuple(seen.shape), int(acts.n)
