"""Every flag of ``vllm serve`` (0.32.0, and older ones that compose files still hold), by what becomes of it.

Flags that share a fate and its reason stand in one group. ``vllm_flags`` answers for a single flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagGroup:
    """Flags with one reason.

    Attributes:
        reason: for ignored flags what kvpage does instead, for refused ones why and the way out, for implemented
            ones what differs from vLLM ("" = nothing); a clause without a full stop.
        switches: flags without a value; each has a ``--no-`` form. values: flags with one value. lists: flags that
            take all words up to the next flag. All separated by blanks.
        off: flag -> values of it that ask for what kvpage does anyway.
    """

    reason: str
    switches: str = ""
    values: str = ""
    lists: str = ""
    off: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Every flag of the group."""
        return [*self.switches.split(), *self.values.split(), *self.lists.split()]


SHORTS: Mapping[str, str] = {
    "-q": "--quantization", "-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size",
    "-n": "--nnodes", "-r": "--node-rank", "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size", "-dp": "--data-parallel-size", "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank", "-dpl": "--data-parallel-size-local", "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port", "-dpb": "--data-parallel-backend", "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb", "-dpm": "--data-parallel-multi-port-external-lb",
    "-ep": "--enable-expert-parallel", "-sc": "--speculative-config", "-dc": "--diffusion-config",
    "-cc": "--compilation-config", "-ac": "--attention-config", "-asc": "--api-server-count",
    "-O": "--optimization-level", "--device-memory-utilization": "--gpu-memory-utilization",
}  # fmt: skip
"""vLLM's other spellings."""

IMPLEMENTED: tuple[FlagGroup, ...] = (
    FlagGroup(
        reason="",
        switches="--skip-tokenizer-init --trust-remote-code --enable-prefix-caching --enforce-eager "
        "--disable-log-stats --disable-uvicorn-access-log --disable-fastapi-docs --allow-credentials "
        "--trust-request-chat-template --enable-auto-tool-choice --enable-force-include-usage "
        "--return-tokens-as-token-ids --enable-tokenizer-info-endpoint --enable-log-requests",
        values="--model --tokenizer --tokenizer-mode --revision --tokenizer-revision --download-dir --hf-token "
        "--load-format --max-model-len --max-num-seqs --max-num-batched-tokens --max-num-queued-reqs "
        "--max-num-queued-tokens --long-prefill-token-threshold --kv-cache-memory-bytes "
        "--num-gpu-blocks-override --max-logprobs --generation-config --chat-template --port --uds --root-path "
        "--ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs --uvicorn-log-level --shutdown-timeout "
        "--sse-keep-alive-interval --config --response-role --tool-call-parser --max-log-len",
        lists="--api-key --served-model-name --allowed-origins",
    ),
    FlagGroup(reason="127.0.0.1 unless given; vLLM listens on every interface", values="--host"),
    FlagGroup(reason='also the name of a plugin\'s policy, beside "fcfs" and "priority"', values="--scheduling-policy"),
    FlagGroup(reason="a value that the engine does not have yet is refused by name",
              values="--dtype --quantization --kv-cache-dtype --attention-backend --tensor-parallel-size "
              "--model-impl"),
    FlagGroup(reason='options of the schemes that quantize while loading, such as {"quantize_head": false}; a key that '
              "the scheme does not have, such as vLLM's, is refused by name", values="--quantization-config"),
    FlagGroup(reason="the attention backend's choice unless given; vLLM takes 16", values="--block-size"),
    FlagGroup(reason="applies to GPUs; on a CPU memory is set by --kv-cache-memory-bytes",
              values="--gpu-memory-utilization"),
    FlagGroup(reason="without it requests without a seed differ from run to run; vLLM takes 0", values="--seed"),
    FlagGroup(reason="of kvpage's own log; for every command", values="--log-level"),
)  # fmt: skip

IGNORED: tuple[FlagGroup, ...] = (
    FlagGroup(reason="cached tokens are always told in usage", switches="--enable-prompt-tokens-details"),
    FlagGroup(reason="X-Request-Id is always answered", switches="--enable-request-id-headers"),
    FlagGroup(reason="/load always counts", switches="--enable-server-load-tracking"),
    FlagGroup(reason="prompts are always split over steps where they are long, none is ever run whole by force",
              switches="--enable-chunked-prefill --scheduler-reserve-full-isl --long-prefill-token-threshold-adaptive"),
    FlagGroup(reason="the engine has one way to schedule; --max-num-seqs and --max-num-batched-tokens size its steps",
              switches="--async-scheduling --disable-hybrid-kv-cache-manager --disable-async-output-proc",
              values="--watermark --prefill-schedule-interval --max-num-scheduled-tokens --max-num-active-seqs "
              "--num-scheduler-steps --scheduler-delay-factor --num-lookahead-slots --max-num-partial-prefills "
              "--max-long-partial-prefills --multi-step-stream-outputs"),
    FlagGroup(reason="a chunk is sent for every step, as with 1", values="--stream-interval"),
    FlagGroup(reason="nothing is compiled and no graph is captured",
              switches="--disable-cascade-attn --enable-layerwise-nvtx-tracing --cudagraph-metrics "
              "--jit-monitor-verbose",
              values="--compilation-config --optimization-level --max-cudagraph-capture-size --jit-monitor-mode "
              "--performance-mode --max-seq-len-to-capture --max-context-len-to-capture",
              lists="--cudagraph-capture-sizes --cuda-graph-sizes"),
    FlagGroup(reason="kernels are chosen by what fits; kvpage plugins explain says which and why",
              switches="--enable-flashinfer-autotune --use-fp64-gumbel",
              values="--ir-op-priority --moe-backend --linear-backend --sparse-indexer-topk-backend "
              "--kernel-config --gdn-prefill-backend --kda-prefill-backend --kda-decode-backend"),
    FlagGroup(reason="no model with state-space layers runs here",
              switches="--enable-mamba-cache-stochastic-rounding --enable-mamba-shared-prefix-checkpoint "
              "--use-replayssm",
              values="--mamba-backend --mamba-ssu-algorithm --mamba-cache-philox-rounds --mamba-cache-dtype "
              "--mamba-ssm-cache-dtype --mamba-block-size --mamba-cache-mode --replayssm-buffer-len"),
    FlagGroup(reason="blocks are found by keyed BLAKE2b hashes and kept as long as memory allows",
              switches="--kv-sharing-fast-prefill --swa-bounded-replay",
              values="--prefix-caching-hash-algo --prefix-cache-retention-interval --prefix-match-unit"),
    FlagGroup(reason="a preempted sequence is computed again, nothing is swapped",
              values="--swap-space --preemption-mode"),
    FlagGroup(reason="text only is served, so there are no media to handle",
              switches="--language-model-only --mm-encoder-only --interleave-mm-strings --skip-mm-profiling "
              "--mm-device-do-normalize --disable-chunked-mm-input --trust-request-mm-kwargs "
              "--disable-mm-preprocessor-cache --enable-multimodal-encoder-data-parallel",
              values="--allowed-local-media-path --limit-mm-per-prompt --media-io-kwargs --mm-processor-kwargs "
              "--mm-processor-cache-gb --mm-processor-cache-type --mm-hasher-algorithm "
              "--mm-shm-cache-max-object-size-mb --mm-encoder-tp-mode --mm-encoder-attn-backend "
              "--mm-encoder-attn-dtype --mm-encoder-fp8-scale-path --mm-encoder-fp8-scale-save-path "
              "--mm-encoder-fp8-scale-save-margin --video-pruning-rate --video-pruning-method --mm-tensor-ipc "
              "--mm-processor-device --mm-ipc-gpu-memory-gb",
              lists="--allowed-media-domains"),
    FlagGroup(reason="weights are read from memory-mapped files, at once and without a bar",
              switches="--use-tqdm-on-load",
              values="--safetensors-load-strategy --safetensors-prefetch-num-threads "
              "--safetensors-prefetch-block-size --pt-load-map-location --max-parallel-loading-workers",
              lists="--ignore-patterns"),
    FlagGroup(reason="a model's own code, where it may run, is that of --revision", values="--code-revision"),
    FlagGroup(reason="a checkpoint runs or is refused by its format's name",
              switches="--allow-deprecated-quantization", values="--quantization-param-path"),
    FlagGroup(reason="one process runs the whole model, so there is nothing between ranks to set",
              switches="--disable-custom-all-reduce --disable-nccl-for-dp-synchronization "
              "--ray-workers-use-nsight --enable-shm-tensor-arena --enable-batch-sharded-sampling "
              "--dcp-q-replicate --enable-ep-weight-filter --aggregate-engine-logging --enable-nccl-comm-suspend "
              "--worker-use-ray --engine-use-ray --disable-frontend-multiprocessing",
              values="--master-addr --master-port --distributed-timeout-seconds --cpu-distributed-timeout-seconds "
              "--dcp-comm-backend --dcp-kv-cache-interleave-size --cp-kv-cache-interleave-size --all2all-backend "
              "--ubatch-size --dbo-decode-token-threshold --dbo-prefill-token-threshold --dp-sync-interval "
              "--eplb-config --expert-placement-strategy --elastic-ep-max-dp-size "
              "--data-parallel-supervisor-port --dp-supervisor-probe-interval-s --dp-supervisor-probe-timeout-s "
              "--dp-supervisor-probe-failure-threshold --data-parallel-address --data-parallel-rpc-port "
              "--data-parallel-backend --fault-tolerance-config"),
    FlagGroup(reason="memory is placed by the operating system; start kvpage under numactl to bind it",
              switches="--numa-bind", lists="--numa-bind-nodes --numa-bind-cpus"),
    FlagGroup(reason="one process and one event loop answer all requests",
              values="--api-server-count --renderer-num-workers --tokenizer-pool-size --tokenizer-pool-type"),
    FlagGroup(reason="--log-level sets what is logged", switches="--enable-log-deltas --log-error-stack "
              "--enable-logging-iteration-details", values="--logging-config --log-config-file"),
    FlagGroup(reason="requests are logged only with --enable-log-requests, answers never",
              switches="--disable-log-requests --enable-log-outputs"),
    FlagGroup(reason="access is logged for all paths, or for none with --disable-uvicorn-access-log",
              values="--disable-access-log-for-endpoints"),
    FlagGroup(reason="/metrics has all numbers, under today's names and in fixed buckets",
              switches="--kv-cache-metrics --enable-mfu-metrics --enable-per-request-metrics",
              values="--show-hidden-metrics-for-version --kv-cache-metrics-sample --custom-histogram-buckets "
              "--per-request-spec-decode-metrics",
              lists="--collect-detailed-traces"),
    FlagGroup(reason="the size of headers is limited by --max-header-bytes",
              values="--h11-max-incomplete-event-size --h11-max-header-count"),
    FlagGroup(reason="a renewed certificate is taken at the next start", switches="--enable-ssl-refresh"),
    FlagGroup(reason="/docs comes from FastAPI as it is", switches="--enable-offline-docs"),
    FlagGroup(reason="system_fingerprint always names kvpage and its version",
              values="--fingerprint-mode --fingerprint-value"),
    FlagGroup(reason="there is no such endpoint here",
              switches="--cohere-is-reasoning-model --enable-flash-late-interaction",
              values="--cohere-format --anthropic-disabled-thinking-effort"),
    FlagGroup(reason="KVPAGE_* variables that nobody knows are left alone",
              switches="--fail-on-environ-validation"),
    FlagGroup(reason="sequences own their blocks through tables in any case", switches="--use-v2-block-manager"),
)  # fmt: skip

REFUSED: tuple[FlagGroup, ...] = (
    FlagGroup(reason="LoRA has not landed yet; merge the adapter into the checkpoint and serve that",
              switches="--enable-lora --enable-tower-connector-lora --fully-sharded-loras --specialize-active-lora "
              "--enable-mixed-moe-lora-format --enable-moe-shared-loras",
              values="--max-loras --max-lora-rank --lora-dtype --max-cpu-loras --default-mm-loras "
              "--max-lora-cls-labels --lora-extra-vocab-size",
              lists="--lora-modules --lora-target-modules", off={"--lora-modules": ("",)}),
    FlagGroup(reason="speculative decoding has not landed yet; leave it out, the text is the same without",
              values="--speculative-config --spec-method --spec-model --spec-tokens --speculative-model "
              "--num-speculative-tokens", off={"--speculative-config": ("none", "null", "{}")}),
    FlagGroup(reason="structured output has not landed yet; leave it out and check answers in the client",
              values="--structured-outputs-config --guided-decoding-backend",
              off={"--structured-outputs-config": ("{}",), "--guided-decoding-backend": ("auto",)}),
    FlagGroup(reason="reasoning is not split off yet; leave it out, it then stands in the content",
              switches="--enable-reasoning",
              values="--reasoning-parser --reasoning-parser-plugin --reasoning-config",
              off={"--reasoning-parser": ("",), "--reasoning-parser-plugin": ("",)}),
    FlagGroup(reason="sleep mode has not landed yet; stop the server to free its memory",
              switches="--enable-sleep-mode --sleep-mode-offload-cudagraph --enable-cumem-allocator",
              lists="--sleep-preserve-parameter-names"),
    FlagGroup(reason="pipeline parallelism has not landed yet; leave it out or take 1",
              values="--pipeline-parallel-size", off={"--pipeline-parallel-size": ("1",)}),
    FlagGroup(reason="data parallelism has not landed yet; run several servers behind a load balancer",
              switches="--data-parallel-hybrid-lb --data-parallel-external-lb "
              "--data-parallel-multi-port-external-lb --headless",
              values="--data-parallel-size --data-parallel-rank --data-parallel-start-rank "
              "--data-parallel-size-local",
              off={"--data-parallel-size": ("1",), "--data-parallel-size-local": ("1",),
                   "--data-parallel-rank": ("0",), "--data-parallel-start-rank": ("0",)}),
    FlagGroup(reason="expert parallelism has not landed yet; experts run where the model does",
              switches="--enable-expert-parallel --enable-eplb --enable-dbo --enable-elastic-ep --enable-hc-sp",
              values="--num-redundant-experts"),
    FlagGroup(reason="context parallelism has not landed yet; leave it out or take 1",
              values="--decode-context-parallel-size --prefill-context-parallel-size",
              off={"--decode-context-parallel-size": ("1",), "--prefill-context-parallel-size": ("1",)}),
    FlagGroup(reason="one machine and one process run the model",
              switches="--enable-fault-tolerance",
              values="--distributed-executor-backend --nnodes --node-rank",
              off={"--distributed-executor-backend": ("uni", "mp"), "--nnodes": ("1",), "--node-rank": ("0",)}),
    FlagGroup(reason="choose GPUs with CUDA_VISIBLE_DEVICES", values="--device-ids"),
    FlagGroup(reason="weights cannot be offloaded yet; kvpage plan says what fits",
              values="--cpu-offload-gb --offload-backend --offload-group-size --offload-num-in-group "
              "--offload-prefetch-step", lists="--cpu-offload-params --offload-params",
              off={"--cpu-offload-gb": ("0", "0.0"), "--offload-backend": ("auto",), "--offload-group-size": ("0",),
                   "--offload-num-in-group": ("1",), "--offload-prefetch-step": ("1",)}),
    FlagGroup(reason="KV blocks stay on the device that made them; there are no KV connectors yet",
              values="--kv-offloading-size --kv-offloading-backend --kv-transfer-config --kv-events-config "
              "--ec-transfer-config --ec-manager-config", lists="--kv-cache-dtype-skip-layers",
              off={"--kv-offloading-backend": ("native",), "--kv-offloading-size": ("0",)}),
    FlagGroup(reason="only log-probabilities before penalties and temperature are reported yet",
              values="--logprobs-mode", off={"--logprobs-mode": ("raw_logprobs",)}),
    FlagGroup(reason="decoders are served, and POST /v1/embeddings answers from the same model; "
              "pooling models have not landed yet",
              values="--runner --convert --task --pooler-config --io-processor-plugin",
              off={"--runner": ("auto", "generate"), "--convert": ("auto", "none"),
                   "--task": ("auto", "generate")}),
    FlagGroup(reason="the model's config.json is read as it is; change it there",
              values="--hf-config-path --hf-overrides --config-format --model-class-overrides "
              "--rope-scaling --rope-theta",
              off={"--hf-overrides": ("{}",), "--config-format": ("auto", "hf"), "--model-class-overrides": ("{}",)}),
    FlagGroup(reason="the model's window is part of the model; --max-model-len at its width has the same effect",
              switches="--disable-sliding-window"),
    FlagGroup(reason="sampling defaults come from the model's generation_config.json; change it there, or leave "
              "them out with --generation-config none",
              values="--override-generation-config", off={"--override-generation-config": ("{}",)}),
    FlagGroup(reason="parts are replaced by kvpage plugins, which are chosen by name (docs/plugins)",
              values="--scheduler-cls --worker-cls --worker-extension-cls --tool-parser-plugin "
              "--model-loader-extra-config --attention-config --additional-config",
              lists="--logits-processors",
              off={"--worker-cls": ("auto",), "--worker-extension-cls": ("",), "--tool-parser-plugin": ("",),
                   "--model-loader-extra-config": ("{}",), "--additional-config": ("{}",)}),
    FlagGroup(reason="tools are run by the client; the server neither runs nor fetches any",
              values="--tool-server"),
    FlagGroup(reason="tool calls are found in the text, not forced upon it; structured output has not landed yet",
              values="--tool-strict-level", off={"--tool-strict-level": ("auto",)}),
    FlagGroup(reason="the chat template is given tools whatever tool_choice says; send none instead",
              switches="--exclude-tools-when-tool-choice-none"),
    FlagGroup(reason="embeddings are no prompts here: send text or token ids",
              switches="--enable-prompt-embeds --enable-mm-embeds"),
    FlagGroup(reason="answers carry no internals of the model",
              switches="--enable-return-routed-experts --return-sampling-mask --enable-trace-replay",
              values="--aux-output-config"),
    FlagGroup(reason="there is no such kind of model or feature here yet; leave it out",
              values="--watermark-config --diffusion-config --engram-config --weight-transfer-config "
              "--profiler-config --override-neuron-config"),
    FlagGroup(reason="HTTP only; put a gRPC gateway before the server", switches="--grpc", values="--grpc-port"),
    FlagGroup(reason="there is no split into render and generate servers",
              switches="--tokens-only --enable-scale-out"),
    FlagGroup(reason="where CORS is on, every method and header is allowed; a proxy can narrow that",
              values="--allowed-methods --allowed-headers",
              off={"--allowed-methods": ('["*"]',), "--allowed-headers": ('["*"]',)}),
    FlagGroup(reason="Python's default ciphers are taken; end TLS in a proxy for others", values="--ssl-ciphers"),
    FlagGroup(reason="middleware of others is not loaded by name; mount kvpage_server.app.create_app in a program "
              "of your own, which may add any", values="--middleware"),
    FlagGroup(reason="the template decides how content is written out; text parts are joined",
              values="--chat-template-content-format",
              off={"--chat-template-content-format": ("auto", "string")}),
    FlagGroup(reason="send chat_template_kwargs with the request, or change the template with --chat-template",
              values="--default-chat-template-kwargs", off={"--default-chat-template-kwargs": ("{}",)}),
    FlagGroup(reason="tracing has not landed yet; scrape /metrics", values="--otlp-traces-endpoint"),
)  # fmt: skip
