"""Names of ColossalAI's live in one folder, and nothing that does the work knows of it."""

from test_layers import imports, sources

WHAT_USERS_CALL = ("accelerator", "booster", "cluster", "colossal", "logging", "nn", "pipeline", "shardformer", "utils")


def test_only_what_users_call_knows_the_folder() -> None:
    modules = sources()
    knows = {
        name.split(".")[1]
        for name, source in modules.items()
        if any(target.startswith("gemini.colossal") for target in imports(name, source, modules))
    }
    assert knows <= set(WHAT_USERS_CALL)
    assert "booster" in knows


def test_what_hands_names_on_has_nothing_of_its_own() -> None:
    thin = "accelerator cluster.dist_coordinator logging utils nn.lr_scheduler shardformer pipeline.schedule.v_schedule"
    modules = sources()
    for name in thin.split():
        assert not any(word in modules[f"gemini.{name}"] for word in ("def ", "class ", "lambda")), name
