"""A Ray cluster of two nodes on this machine, as a program that prints its address.

`lose` takes the second node away, `join` adds another. Nodes on loopback, one CPU each. Ends with its standard input.
"""

from __future__ import annotations

import sys


def say(words: str) -> None:
    sys.stdout.write(words + "\n")
    sys.stdout.flush()


def main() -> None:
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        second = cluster.add_node(**small)
        cluster.wait_for_nodes()
        say(f"address {cluster.address}")
        for line in sys.stdin:
            if line.strip() == "lose":
                cluster.remove_node(second, allow_graceful=False)
                say("lost")
            if line.strip() == "join":
                second = cluster.add_node(**small)
                cluster.wait_for_nodes()
                say("joined")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
