"""Workers of several GPUs on a cluster that says it has some:  python -m tests.cluster.fake_gpus

Nodes of 4, 3 and 1 GPUs that are none: how many workers of 1 to 5 GPUs there would be, or why there is none.
"""

import ray
from ray.cluster_utils import Cluster as Nodes

from alphatoken.pipeline.cluster.cluster import Cluster
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.settings import ClusterSettings

if __name__ == "__main__":
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 4, "include_dashboard": False})
    for gpus in (3, 1):
        nodes.add_node(num_cpus=4, num_gpus=gpus)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    for asked in ("auto", 0.5, 1, 2, 3, 4, 5):
        try:
            found = Cluster(ClusterSettings(gpus_per_worker=asked), False).model_resources()
            print(asked, found.workers, found.gpus)
        except RunFailed as error:
            print(asked, error)
    ray.shutdown()
    nodes.shutdown()
