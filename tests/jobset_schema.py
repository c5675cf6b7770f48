"""The fields of a JobSet, jobset.x-k8s.io/v1alpha2, as a JSON schema that allows no others.

From the API's reference (jobset.sigs.k8s.io); what is inside a Job is Kubernetes' own schema's.
"""

TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
FLAG, COUNT = {"type": "boolean"}, {"type": "integer", "minimum": 0}
WORDS = {"type": "object", "additionalProperties": TEXT}


def one_of(*words: str) -> dict:
    return {"enum": list(words)}


def items(schema: dict, **limits: int) -> dict:
    return {"type": "array", "items": schema} | limits


def fields(*required: str, **properties: dict) -> dict:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


ACTIONS = (
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
)
# What a Job can fail for.
REASONS = (
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
)
METADATA = fields("name", name=TEXT, namespace=TEXT, labels=WORDS, annotations=WORDS)
RULE = fields(
    "name",
    "action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=one_of(*ACTIONS),
    onJobFailureReasons=items(one_of(*REASONS), uniqueItems=True),
    onJobFailureMessagePatterns=TEXTS,
    targetReplicatedJobs=TEXTS,
)
REPLICATED_JOB = fields(
    "name",
    "template",
    name=TEXT,
    groupName=TEXT,
    replicas=COUNT,
    template=fields(
        "spec", metadata=fields(labels=WORDS, annotations=WORDS), spec={"type": "object"}
    ),
    dependsOn=items(
        fields("name", "status", name=TEXT, status=one_of("Ready", "Complete")), maxItems=5
    ),
)
SPEC = fields(
    "replicatedJobs",
    replicatedJobs=items(REPLICATED_JOB, minItems=1),
    network=fields(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
    successPolicy=fields("operator", operator=one_of("All", "Any"), targetReplicatedJobs=TEXTS),
    failurePolicy=fields(
        maxRestarts=COUNT,
        restartStrategy=one_of("Recreate", "BlockingRecreate", "InPlaceRestart"),
        rules=items(RULE),
    ),
    startupPolicy=fields("startupPolicyOrder", startupPolicyOrder=one_of("AnyOrder", "InOrder")),
    suspend=FLAG,
    coordinator=fields("replicatedJob", replicatedJob=TEXT, jobIndex=COUNT, podIndex=COUNT),
    managedBy=TEXT,
    ttlSecondsAfterFinished=COUNT,
)
JOBSET = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=METADATA,
    spec=SPEC,
)
