"""Figures of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter

__all__ = ["Figures"]

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the intervals of the seconds of an answer."""


class Figures:
    """Counts of requests, batches and seconds."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[float] = Counter()
        self._sum = self._batch_seconds = 0.0
        self._count = self._batches = self._images = 0

    def request(self, adapter: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            adapter: The adapter that was asked for, or an empty text where there is none of that name.
            status: The status of the response; 499 where the client had gone.
            seconds: From the request to its response.
        """
        with self._lock:
            self._requests[adapter, status] += 1
            self._sum, self._count = self._sum + seconds, self._count + 1
            for bound in BOUNDS:
                self._seconds[bound] += seconds <= bound

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch.

        Args:
            images: Its images.
            seconds: The seconds it took.
        """
        with self._lock:
            self._batches, self._images = self._batches + 1, self._images + images
            self._batch_seconds += seconds

    def text(self, waiting: int, adapters: int, held: int) -> str:
        """Write all figures.

        Args:
            waiting: Images that wait.
            adapters: Adapters that answer.
            held: Bytes of the images that were received and not answered yet.
        """
        with self._lock:
            lines = ["# TYPE vispeft_requests_total counter"]
            for (adapter, status), count in sorted(self._requests.items()):
                lines.append(f'vispeft_requests_total{{adapter="{adapter}",status="{status}"}} {count}')
            lines.append("# TYPE vispeft_request_seconds histogram")
            lines += [f'vispeft_request_seconds_bucket{{le="{bound}"}} {self._seconds[bound]}' for bound in BOUNDS]
            lines.append(f'vispeft_request_seconds_bucket{{le="+Inf"}} {self._count}')
            lines += [f"vispeft_request_seconds_sum {self._sum:.6f}", f"vispeft_request_seconds_count {self._count}"]
            counters = {
                "batches": self._batches,
                "images": self._images,
                "batch_seconds": round(self._batch_seconds, 6),
            }
            for name, value in counters.items():
                lines += [f"# TYPE vispeft_{name}_total counter", f"vispeft_{name}_total {value}"]
            for name, value in (("waiting_images", waiting), ("held_bytes", held), ("adapters", adapters)):
                lines += [f"# TYPE vispeft_{name} gauge", f"vispeft_{name} {value}"]
        return "\n".join(lines) + "\n"
