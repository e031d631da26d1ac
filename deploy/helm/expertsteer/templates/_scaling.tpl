{{/*
What a pod shall carry before another one is added, under the key `targets`. A target that is 0 is left out. Takes spec.
How many steered requests are many depends on the batch, whose default size vLLM chooses by the GPU: none by default.
Series are those of the server; `adapter` is their name in deploy/helm/prometheus-adapter-values.yaml.
*/}}
{{- define "expertsteer.scalingTargets" -}}
{{- $wanted := mergeOverwrite (dict "waitingRequests" 5 "steeredRequests" 0 "cachePercent" 85) (dig "autoscaling" "targets" dict .spec) (dig "keda" "targets" dict .spec) -}}
{{- $targets := list -}}
{{- with int $wanted.waitingRequests -}}
{{- $targets = append $targets (dict "series" "vllm:num_requests_waiting" "adapter" "vllm_num_requests_waiting" "perPod" (toString .) "threshold" (toString .)) -}}
{{- end -}}
{{- with int $wanted.steeredRequests -}}
{{- $targets = append $targets (dict "series" "steering_engine_requests" "adapter" "steering_engine_requests" "perPod" (toString .) "threshold" (toString .)) -}}
{{- end -}}
{{- with int $wanted.cachePercent -}}
{{- $targets = append $targets (dict "series" "vllm:kv_cache_usage_perc" "adapter" "vllm_kv_cache_usage" "isShare" true "perPod" (printf "%dm" (mul . 10)) "threshold" (printf "%.2f" (divf . 100))) -}}
{{- end -}}
{{- dict "targets" $targets | toYaml -}}
{{- end -}}

{{/* Address of the Prometheus that autoscalers ask. Takes spec. */}}
{{- define "expertsteer.prometheus" -}}
{{- dig "keda" "serverAddress" "http://prometheus-operated.monitoring.svc:9090" .spec -}}
{{- end -}}

{{/*
Sum of a series over a model's pods, by the labels that a ServiceMonitor sets. A share is first averaged over the engines of
each pod, of which data parallelism makes several. Takes root, spec, target (one of scalingTargets).
*/}}
{{- define "expertsteer.scalingQuery" -}}
{{- $series := printf "%s{namespace=%q,service=%q}" .target.series .root.Release.Namespace (include "expertsteer.service" .) -}}
{{- if .target.isShare -}}
{{- $series = printf "avg by (pod) (%s)" $series -}}
{{- end -}}
{{- printf "sum(%s)" $series -}}
{{- end -}}
