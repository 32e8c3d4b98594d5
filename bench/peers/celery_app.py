"""Celery: a task a post, acknowledged when it is done; started as a prefork worker of it."""

from __future__ import annotations

import os
from typing import Any

import tagger
from celery import Celery
from celery.signals import worker_process_init
from pymongo.errors import PyMongoError

app = Celery("tags", broker=os.environ["PEERS_BROKER"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    task_default_queue="celery.posts",
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)
_taggers: list[tagger.Tagger] = []


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
def load(**_: Any) -> None:
    """Load the models of a child."""
    _taggers.append(tagger.load_tagger())


@app.task(name="tag_post", bind=True, max_retries=5)  # type: ignore[untyped-decorator]
def tag_post(self: Any, post_id: str) -> None:
    """Tag a post."""
    try:
        _taggers[0].tag([post_id])
    except PyMongoError as error:
        raise self.retry(exc=error, countdown=2**self.request.retries) from error
