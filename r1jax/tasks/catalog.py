"""The tasks by the name that a config gives."""

from r1jax.tasks.finance.task import Finance
from r1jax.tasks.language.task import Language
from r1jax.tasks.medical.task import Medical
from r1jax.tasks.records.task import RecordsTask

TASKS = {"medical": Medical, "language": Language, "finance": Finance, "records": RecordsTask}
