# tasks.py
import flags
from celery import Celery
from celery.signals import worker_process_shutdown

app = Celery("tasks")


@app.task
def price(person):
    found = flags.client.evaluate_flags(person, only_evaluate_locally=True)
    return 90 if found.is_enabled("cheaper") else 100


@worker_process_shutdown.connect
def stop_posthog(**_):
    flags.client.shutdown()
