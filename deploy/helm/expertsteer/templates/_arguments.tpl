{{/* Whole number as text: values arrive as floating-point numbers. */}}
{{- define "expertsteer.whole" -}}
{{- int64 . -}}
{{- end -}}

{{/* Arguments of `expertsteer` as a list. Takes root, spec, steering. */}}
{{- define "expertsteer.arguments" -}}
{{- $engine := .root.Values.servingEngineSpec -}}
{{- $embedded := hasPrefix "embedded://" .spec.modelURL -}}
{{- $args := list -}}
{{- if $embedded -}}
{{- $args = list "demo" -}}
{{- else -}}
{{- $args = list "serve" .spec.modelURL -}}
{{- end -}}
{{- $args = concat $args (list "--host" "0.0.0.0" "--port" (include "expertsteer.whole" $engine.containerPort)) -}}
{{- if $embedded -}}
{{- $args = append $args "--show-log" -}}
{{- $args = append $args "--" -}}
{{- end -}}
{{- range $key, $flag := dict "enableLoRA" "--enable-lora" "enableTool" "--enable-auto-tool-choice" -}}
{{- if get $.spec $key -}}
{{- $args = append $args $flag -}}
{{- end -}}
{{- end -}}
{{- with .spec.toolCallParser -}}
{{- $args = concat $args (list "--tool-call-parser" .) -}}
{{- end -}}
{{- $config := .spec.vllmConfig | default dict -}}
{{- range $key, $flag := dict "enableChunkedPrefill" "enable-chunked-prefill" "enablePrefixCaching" "enable-prefix-caching" -}}
{{- if hasKey $config $key -}}
{{- $args = append $args (printf "--%s%s" (ternary "" "no-" (get $config $key)) $flag) -}}
{{- end -}}
{{- end -}}
{{- range $key, $flag := dict "maxModelLen" "--max-model-len" "tensorParallelSize" "--tensor-parallel-size" "pipelineParallelSize" "--pipeline-parallel-size" "dataParallelSize" "--data-parallel-size" "maxNumSeqs" "--max-num-seqs" "maxLoras" "--max-loras" -}}
{{- if hasKey $config $key -}}
{{- $args = concat $args (list $flag (include "expertsteer.whole" (get $config $key))) -}}
{{- end -}}
{{- end -}}
{{- range $key, $flag := dict "dtype" "--dtype" "gpuMemoryUtilization" "--gpu-memory-utilization" "revision" "--revision" -}}
{{- with get $config $key -}}
{{- $args = concat $args (list $flag (toString .)) -}}
{{- end -}}
{{- end -}}
{{- with .spec.modelRevision -}}
{{- $args = concat $args (list "--revision" .) -}}
{{- end -}}
{{- with .spec.chatTemplate -}}
{{- $args = concat $args (list "--chat-template" (printf "/templates/%s" .)) -}}
{{- end -}}
{{- $args = concat $args (list "--shutdown-timeout" (include "expertsteer.whole" .steering.shutdownTimeoutSeconds)) -}}
{{- if ne .steering.registry.mode "none" -}}
{{- $args = concat $args (list "--steering-registry" "/var/lib/expertsteer/registry") -}}
{{- end -}}
{{- if include "expertsteer.declares" . -}}
{{- $args = concat $args (list "--steering-declaration" "/etc/expertsteer/bundles/bundles.yaml") -}}
{{- end -}}
{{- with .steering.remote -}}
{{- $args = concat $args (list "--steering-remote") . -}}
{{- end -}}
{{- with .steering.bundleRoot -}}
{{- $args = concat $args (list "--steering-bundle-root" .) -}}
{{- end -}}
{{- if include "expertsteer.secretRef" (dict "root" .root "value" .steering.keys "key" "keys.yaml") -}}
{{- $args = concat $args (list "--steering-keys" "/etc/expertsteer/keys/keys.yaml") -}}
{{- end -}}
{{- if ne .steering.signatures.mode "off" -}}
{{- $args = concat $args (list "--steering-signatures" .steering.signatures.mode "--steering-signature-key") -}}
{{- range .steering.signatures.files -}}
{{- $args = append $args (printf "/etc/expertsteer/signature-keys/%s" .) -}}
{{- end -}}
{{- end -}}
{{- $steering := .steering -}}
{{- range $key, $flag := dict "rows" "--steering-rows" "keepVersions" "--steering-keep-versions" "maxBundleMib" "--steering-max-bundle-mib" "metricProfiles" "--steering-metric-profiles" -}}
{{- if hasKey $steering $key -}}
{{- $args = concat $args (list $flag (include "expertsteer.whole" (get $steering $key))) -}}
{{- end -}}
{{- end -}}
{{- range $key, $flag := dict "fingerprint" "--steering-fingerprint" "fusion" "--steering-fusion" -}}
{{- with get $steering $key -}}
{{- $args = concat $args (list $flag .) -}}
{{- end -}}
{{- end -}}
{{- if not .steering.playground -}}
{{- $args = append $args "--disable-steering-playground" -}}
{{- end -}}
{{- $args = concat $args ($config.extraArgs | default list) (.steering.extraArgs | default list) -}}
{{- toYaml $args -}}
{{- end -}}
