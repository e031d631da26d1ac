{{/* Security of the pod, and of every container in it. */}}
{{- define "expertsteer.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "expertsteer.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Annotations of the pods: those of the model, and what a change of must restart them. Takes root, spec, steering. */}}
{{- define "expertsteer.podAnnotations" -}}
{{- $annotations := deepCopy (.spec.podAnnotations | default dict) -}}
{{- /* Not of the whole Secret, whose labels change with the chart's version. */ -}}
{{- with include "expertsteer.secretTexts" .root -}}
{{- $_ := set $annotations "checksum/secrets" (sha256sum .) -}}
{{- end -}}
{{- with .root.Values.servingEngineSpec.configs -}}
{{- $_ := set $annotations "checksum/configs" (toYaml . | sha256sum) -}}
{{- end -}}
{{- with .spec.chatTemplateConfigMap -}}
{{- $_ := set $annotations "checksum/chat-templates" (sha256sum .) -}}
{{- end -}}
{{- with $annotations -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{/* Tolerations of a model as a list. Takes root, spec. */}}
{{- define "expertsteer.tolerations" -}}
{{- $all := .root.Values.servingEngineSpec.tolerations | default list -}}
{{- if .spec.tolerations -}}
{{- $all = ternary .spec.tolerations (concat $all .spec.tolerations) (eq (.spec.tolerationsPolicy | default "append") "override") -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Affinity of a model. Takes spec. */}}
{{- define "expertsteer.affinity" -}}
{{- if .spec.affinity -}}
{{- toYaml .spec.affinity -}}
{{- else if and .spec.nodeSelectorTerms (not .spec.nodeName) -}}
{{- $terms := dict "nodeSelectorTerms" .spec.nodeSelectorTerms -}}
{{- dict "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" $terms) | toYaml -}}
{{- end -}}
{{- end -}}

{{/* Specification of a model's pod. Takes root, spec, steering, container (the name of the server's container). */}}
{{- define "expertsteer.pod" -}}
{{- $engine := .root.Values.servingEngineSpec -}}
{{- $spec := .spec -}}
{{- $volumes := include "expertsteer.volumes" . | fromYaml -}}
{{- $hasGpu := gt (int (get $spec "requestGPU" | default 0)) 0 -}}
{{- range $name, $_ := dig "resources" "limits" dict $spec -}}
{{- if hasPrefix "nvidia.com/" $name }}{{ $hasGpu = true }}{{ end -}}
{{- end -}}
{{- $runtime := ternary $spec.runtimeClassName (ternary $engine.runtimeClassName "" $hasGpu) (hasKey $spec "runtimeClassName") -}}
automountServiceAccountToken: false
# Variables such as VLLM_PORT, that Kubernetes makes of a Service called vllm, mean something else to vLLM.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add (int .steering.preStopSeconds) (int .steering.shutdownTimeoutSeconds) 30 }}
securityContext:
  {{- mergeOverwrite (include "expertsteer.podSecurity" . | fromYaml) (deepCopy ($engine.securityContext | default dict)) | toYaml | nindent 2 }}
{{- with $spec.serviceAccountName }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with $spec.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $runtime }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $engine.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- with $spec.nodeName }}
nodeName: {{ . | quote }}
{{- end }}
{{- with $spec.imagePullSecret }}
imagePullSecrets:
  - name: {{ . | quote }}
{{- end }}
{{- with include "expertsteer.tolerations" . | fromYamlArray }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "expertsteer.affinity" . }}
affinity:
  {{- . | nindent 2 }}
{{- end }}
{{- with $spec.initContainer }}
initContainers:
  - name: {{ .name | quote }}
    image: {{ .image | quote }}
    {{- range $field := list "command" "args" "env" "resources" }}
    {{- with get $spec.initContainer $field }}
    {{ $field }}:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
    {{- with $spec.envFromSecret }}
    envFrom:
      - secretRef:
          name: {{ .name | quote }}
    {{- end }}
    securityContext:
      {{- mergeOverwrite (include "expertsteer.containerSecurity" $ | fromYaml) (deepCopy ($engine.containerSecurityContext | default dict)) | toYaml | nindent 6 }}
    {{- $own := list (dict "name" "tmp" "mountPath" "/tmp") }}
    {{- if and .mountPvcStorage (hasKey $spec "pvcStorage") }}
    {{- $own = append $own (dict "name" "storage" "mountPath" "/data") }}
    {{- end }}
    volumeMounts:
      {{- concat $own (.extraVolumeMounts | default list) | toYaml | nindent 6 }}
{{- end }}
containers:
  - name: {{ .container }}
    image: {{ printf "%s:%s" $spec.repository (toString $spec.tag) | quote }}
    imagePullPolicy: {{ $engine.imagePullPolicy }}
    command: [expertsteer]
    args:
      {{- include "expertsteer.arguments" . | nindent 6 }}
    {{- with include "expertsteer.environment" . | fromYamlArray }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- if or $engine.configs $spec.envFromSecret }}
    envFrom:
      {{- if $engine.configs }}
      - configMapRef:
          name: {{ printf "%s-configs" .root.Release.Name | quote }}
      {{- end }}
      {{- with $spec.envFromSecret }}
      - secretRef:
          name: {{ .name | quote }}
      {{- end }}
    {{- end }}
    ports:
      - name: container-port
        containerPort: {{ include "expertsteer.whole" $engine.containerPort }}
        protocol: TCP
    {{- range $probe := list "startupProbe" "livenessProbe" "readinessProbe" }}
    {{- with get $engine $probe }}
    {{ $probe }}:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
    lifecycle:
      preStop:
        sleep:
          # Until load balancers have heard that no new request should come here.
          seconds: {{ include "expertsteer.whole" .steering.preStopSeconds }}
    {{- with include "expertsteer.resources" . | fromYaml }}
    resources:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- mergeOverwrite (include "expertsteer.containerSecurity" . | fromYaml) (deepCopy ($engine.containerSecurityContext | default dict)) | toYaml | nindent 6 }}
    volumeMounts:
      {{- toYaml $volumes.mounts | nindent 6 }}
volumes:
  {{- toYaml $volumes.volumes | nindent 2 }}
{{- end -}}
