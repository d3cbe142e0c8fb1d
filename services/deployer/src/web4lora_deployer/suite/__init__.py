"""The post-deployment suite: prompts with checks, run against any OpenAI-compatible endpoint.

`load_suite` reads a suite from its folder, `run_suite` asks a model and grades its answers, `score_suite`
compares models over the same prompts, and `judge` holds the figures against the budgets.
"""

from web4lora_deployer.suite.budgets import (
    Budgets,
    Gate,
    Measurements,
    State,
    check_budgets,
    judge,
    state_of,
    verdict,
)
from web4lora_deployer.suite.chat import Endpoint
from web4lora_deployer.suite.load import load_suite
from web4lora_deployer.suite.result import Answer, Latency, Reply, SuiteResult
from web4lora_deployer.suite.run import run_suite
from web4lora_deployer.suite.scores import Score, score_details, score_suite
from web4lora_deployer.suite.spec import Core, Prompt, Suite

__all__ = [
    "Answer",
    "Budgets",
    "Core",
    "Endpoint",
    "Gate",
    "Latency",
    "Measurements",
    "Prompt",
    "Reply",
    "Score",
    "State",
    "Suite",
    "SuiteResult",
    "check_budgets",
    "judge",
    "load_suite",
    "run_suite",
    "score_details",
    "score_suite",
    "state_of",
    "verdict",
]
