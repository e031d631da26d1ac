{{/* Enabled models as a list under the key `models`. */}}
{{- define "expertsteer.models" -}}
{{- $models := list -}}
{{- if .Values.servingEngineSpec.enableEngine -}}
{{- range .Values.servingEngineSpec.modelSpec -}}
{{- if ne (get . "enabled" | toString) "false" -}}
{{- $models = append $models . -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- dict "models" $models | toYaml -}}
{{- end -}}

{{/*
The section `steering` of a model: its own over that of all models. What it declares replaces what all declare, since bundles
are made for one model. Takes root, spec.
*/}}
{{- define "expertsteer.steering" -}}
{{- $own := .spec.steering | default dict -}}
{{- $all := mergeOverwrite (deepCopy .root.Values.steering) (deepCopy $own) -}}
{{- $registry := $own.registry | default dict -}}
{{- if or (hasKey $registry "bundles") (hasKey $registry "bundlesConfigMap") -}}
{{- $_ := set $all.registry "bundles" ($registry.bundles | default dict) -}}
{{- $_ := set $all.registry "bundlesConfigMap" ($registry.bundlesConfigMap | default "") -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Name of a model's workload. Takes root, spec. */}}
{{- define "expertsteer.name" -}}
{{- printf "%s-%s" .root.Release.Name .spec.name -}}
{{- end -}}

{{/* Name of a model's Service: as in the production stack, whose router may be given it. Takes root, spec. */}}
{{- define "expertsteer.service" -}}
{{- printf "%s-engine-service" (include "expertsteer.name" .) -}}
{{- end -}}

{{/* Labels of everything in the release. Takes the root. */}}
{{- define "expertsteer.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Labels that select the pods of a model; never changed, as selectors cannot be. Takes root, spec. */}}
{{- define "expertsteer.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: serving-engine
model: {{ .spec.name | quote }}
helm-release-name: {{ .root.Release.Name | quote }}
{{- end -}}

{{/* Labels of a model's objects. Takes root, spec. */}}
{{- define "expertsteer.modelLabels" -}}
{{- $all := merge (include "expertsteer.selector" . | fromYaml) (include "expertsteer.labels" .root | fromYaml) (.root.Values.servingEngineSpec.labels | default dict) -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Labels of a model's pods: without versions, so that a new chart alone restarts nothing. Takes root, spec. */}}
{{- define "expertsteer.podLabels" -}}
{{- merge (include "expertsteer.selector" . | fromYaml) (.spec.podLabels | default dict) (.root.Values.servingEngineSpec.labels | default dict) | toYaml -}}
{{- end -}}

{{/* Reference to a key of a secret, or nothing. Takes root, value (a string or {secretName, secretKey}), key. */}}
{{- define "expertsteer.secretRef" -}}
{{- if kindIs "string" .value -}}
{{- if .value -}}
name: {{ printf "%s-secrets" .root.Release.Name | quote }}
key: {{ .key | quote }}
{{- end -}}
{{- else if and .value .value.secretName -}}
name: {{ .value.secretName | quote }}
key: {{ .value.secretKey | quote }}
{{- end -}}
{{- end -}}

{{/* Keys that are given as text, by their key in the Secret of the release. Takes the root. */}}
{{- define "expertsteer.secretTexts" -}}
{{- $texts := dict -}}
{{- range $key, $value := dict "vllmApiKey" .Values.servingEngineSpec.vllmApiKey "adminKey" .Values.steering.adminKey -}}
{{- if and (kindIs "string" $value) $value -}}
{{- $_ := set $texts $key $value -}}
{{- end -}}
{{- end -}}
{{- range (include "expertsteer.models" . | fromYaml).models -}}
{{- if and (kindIs "string" .hf_token) .hf_token -}}
{{- $_ := set $texts (printf "hf_token_%s" .name) .hf_token -}}
{{- end -}}
{{- end -}}
{{- with $texts }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* Kind of a model's workload. Takes steering. */}}
{{- define "expertsteer.kind" -}}
{{- if eq .steering.registry.mode "pvc" -}}StatefulSet{{- else -}}Deployment{{- end -}}
{{- end -}}

{{/* "true" where a model declares its profiles. Takes steering. */}}
{{- define "expertsteer.declares" -}}
{{- if or .steering.registry.bundles .steering.registry.bundlesConfigMap -}}true{{- end -}}
{{- end -}}

{{/* Name of the ConfigMap that holds bundles.yaml. Takes root, spec, steering. */}}
{{- define "expertsteer.bundlesName" -}}
{{- .steering.registry.bundlesConfigMap | default (printf "%s-bundles" (include "expertsteer.name" .)) -}}
{{- end -}}

{{/* "true" where the number of pods is left to an autoscaler. Takes spec. */}}
{{- define "expertsteer.autoscales" -}}
{{- if or (dig "autoscaling" "enabled" false .spec) (dig "keda" "enabled" false .spec) -}}true{{- end -}}
{{- end -}}

{{/* "true" where a model may be without pods: none are asked for, or KEDA may take the last one away. Takes spec. */}}
{{- define "expertsteer.mayHaveNoPods" -}}
{{- $keda := .spec.keda | default dict -}}
{{- if $keda.enabled -}}
{{- if or (eq (int (dig "minReplicaCount" 1 $keda)) 0) (eq (int (dig "idleReplicaCount" 1 $keda)) 0) -}}true{{- end -}}
{{- else if and (not (include "expertsteer.autoscales" .)) (eq (int (dig "replicaCount" 1 .spec)) 0) -}}true{{- end -}}
{{- end -}}

{{/*
"true" where Prometheus always has a target, unless something is wrong: a model always has pods, or there is none here and the
servers are elsewhere. Takes the root.
*/}}
{{- define "expertsteer.alwaysHasPods" -}}
{{- $models := (include "expertsteer.models" . | fromYaml).models -}}
{{- $always := not $models -}}
{{- range $models -}}
{{- if not (include "expertsteer.mayHaveNoPods" (dict "spec" .)) }}{{ $always = true }}{{ end -}}
{{- end -}}
{{- if $always -}}true{{- end -}}
{{- end -}}

{{/*
"true" where files may come over HTTPS: the model, what a container that runs first fetches, or bundles. Takes root, spec,
steering.
*/}}
{{- define "expertsteer.downloads" -}}
{{- $isLocal := and (or (hasPrefix "/" .spec.modelURL) (hasPrefix "embedded://" .spec.modelURL)) (not .spec.initContainer) -}}
{{- range concat (.root.Values.servingEngineSpec.env | default list) (.spec.env | default list) -}}
{{- /* KServe downloads what this names. */ -}}
{{- if eq .name "STORAGE_URI" }}{{ $isLocal = false }}{{ end -}}
{{- end -}}
{{- if or .steering.remote (not $isLocal) -}}true{{- end -}}
{{- end -}}
